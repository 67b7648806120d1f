"""Proximal policy optimisation of language models, usable by itself: see docs/ppo.md.

It needs torch, transformers, accelerate and, for LoRA, peft. The names below load when they are asked for, so that
looking at options does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.config.ppo_options import Settings
    from rlhf.ppo.batching import Prompts
    from rlhf.ppo.policy import Policy, ValueModel
    from rlhf.ppo.trainer import Trainer

_HOMES = {
    "Policy": "policy",
    "Prompts": "batching",
    "Settings": "settings",
    "Trainer": "trainer",
    "ValueModel": "policy",
}

__all__ = ["Policy", "Prompts", "Settings", "Trainer", "ValueModel"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
