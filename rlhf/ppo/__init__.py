"""Proximal policy optimisation of language models, usable by itself: see docs/ppo.md.

May import torch, transformers, accelerate and, for LoRA, peft; of this project rewards (not their models), models,
config.ppo_options and what lies below them, and no stage.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.config.ppo_options import Settings as Settings
    from rlhf.ppo.batching import Prompts as Prompts
    from rlhf.ppo.policy import Policy as Policy, ValueModel as ValueModel
    from rlhf.ppo.trainer import Trainer as Trainer
else:
    __getattr__ = lazily(__name__)
