"""Rewards: Python functions, built-in rules, a trained reward model, or a weighted sum of several; see docs/rewards.md.

A reward function takes the texts of a batch and gives one number a row::

    def brevity(prompts, responses, **columns) -> list[float]:
        return [-len(response.split()) for response in responses]

``columns`` are the other columns of the prompt files, as lists; a function that names just some of them gets just
these. Responses have no special tokens.

The names below load when they are asked for, so that a configuration is checked without loading torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.rewards.functions import FunctionScorer, RewardFunction, Scorer, call_reward, load_function, make_scorer
    from rlhf.rewards.model import RewardModel
    from rlhf.rewards.weighted import Rewards, make_rewards

__all__ = [
    "FunctionScorer",
    "RewardFunction",
    "RewardModel",
    "Rewards",
    "Scorer",
    "call_reward",
    "load_function",
    "make_rewards",
    "make_scorer",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Written as imports, and not by name, so that these modules are fingerprinted.
    import rlhf.rewards.functions as functions
    import rlhf.rewards.model as model
    import rlhf.rewards.weighted as weighted

    return next(getattr(home, name) for home in (weighted, model, functions) if hasattr(home, name))
