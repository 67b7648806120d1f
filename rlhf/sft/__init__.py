"""The stage `sft`: supervised fine-tuning on demonstrations.

May import training and what lies below it; no other stage.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.sft.stage import run
else:
    __getattr__ = lazily(__name__)
