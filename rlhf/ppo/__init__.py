"""Proximal policy optimisation of language models, usable by itself: see docs/ppo.md.

May import torch, transformers, accelerate and, for LoRA, peft (for judges, SciPy); of this project rewards (not their
models), models, config.ppo_options and what lies below them, and no stage.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.config.ppo_options import Settings
    from rlhf.ppo.batching import Prompts
    from rlhf.ppo.policy import Policy, ValueModel
    from rlhf.ppo.trainer import Trainer
else:
    __getattr__ = lazily(__name__)
