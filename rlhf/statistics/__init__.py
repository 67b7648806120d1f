"""Intervals, tests and agreement: pure functions on NumPy arrays.

May import errors alone.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.statistics.intervals import Estimate, Floats, bootstrap_interval, paired_test, without_nan
else:
    __getattr__ = lazily(__name__)
