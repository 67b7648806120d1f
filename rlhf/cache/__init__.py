"""Why a stage runs again: its cache key, what it is made of, and the plan of a run.

May import the stages' table, config, store and what lies below them; it computes nothing.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.cache.plan import Planner, Selection, StagePlan
else:
    __getattr__ = lazily(__name__)
