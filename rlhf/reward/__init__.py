"""The stage `reward`: training of the reward model and of a second one, held out, which only judges. (`rewards` is what
scores.)

May import training and what lies below it; no other stage.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.reward.stage import run
else:
    __getattr__ = lazily(__name__)
