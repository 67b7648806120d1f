"""The stage `evaluate`: the policies on held-out prompts, their metrics, and the comparison of them.

May import the stages judge and ppo, and what lies below them.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.evaluate.stage import run
else:
    __getattr__ = lazily(__name__)
