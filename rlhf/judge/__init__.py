"""The stage `judge`: who says which of two responses is better.

May import the stages prepare, ppo (to sample) and reward (a judge model), and what lies below them.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.judge.stage import run
else:
    __getattr__ = lazily(__name__)
