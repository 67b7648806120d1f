"""The weighted sum of rewards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.rewards.functions import FunctionScorer, RewardFunction, Scorer, make_scorer
from rlhf.rewards.model import RewardModel
from rlhf.rewards.registry import MODEL, labels


class Spec(Protocol):
    """What a configuration says of one reward."""

    @property
    def weight(self) -> float:
        """Its factor in the sum."""

    @property
    def function(self) -> str:
        """``model``, a built-in, ``module:function`` or ``path/file.py:function``."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What the function gets beside the texts and columns."""


@dataclass(frozen=True)
class Rewards:
    """A weighted sum of scorers. ``parts`` maps the short name of each, as in its metric, to weight and scorer."""

    parts: Mapping[str, tuple[float, Scorer]]

    @classmethod
    def of(cls, *functions: RewardFunction) -> Rewards:
        """The plain sum of reward functions, each called by its own name.

        Raises:
            ConfigError: two have the same name.
        """
        names = [_name(function) for function in functions]
        for name, count in Counter(names).items():
            if count > 1:
                raise ConfigError(
                    f"{count} rewards are called {name!r}, and each is reported by its name; define them with names of "
                    f"their own, or set their __name__"
                )
        return cls({name: (1.0, FunctionScorer(f, name)) for name, f in zip(names, functions, strict=True)})

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum (B,), and each component (B,) before its weight."""
        components = {
            name: torch.tensor(scorer(prompts, responses, columns), dtype=torch.float32)
            for name, (_, scorer) in self.parts.items()
        }
        scores = torch.zeros(len(responses))
        for name, (weight, _) in self.parts.items():
            scores += weight * components[name]
        return scores, components


def make_rewards(named: Mapping[str, float | Spec], reward_model: RewardModel | None) -> Rewards:
    """The weighted sum that a configuration names; a plain weight is of the function that its name is.

    Components are called by their ``labels``.

    Raises:
        ConfigError: a function cannot be loaded or does not take its arguments, or the reward model is named and
            there is none; or two labels are the same.
    """
    short = labels(named)
    parts: dict[str, tuple[float, Scorer]] = {}
    for name, spec in named.items():
        weight, function, arguments = (
            (spec, name, {}) if isinstance(spec, int | float) else (spec.weight, spec.function, spec.arguments)
        )
        parts[short[name]] = (weight, _scorer(function, arguments, reward_model))
    return Rewards(parts)


def _name(function: RewardFunction) -> str:
    if not hasattr(function, "__name__") and isinstance(function, partial):
        return _name(function.func)
    return str(getattr(function, "__name__", type(function).__name__))


def _scorer(function: str, arguments: Mapping[str, Any], reward_model: RewardModel | None) -> Scorer:
    if function != MODEL:
        return make_scorer(function, arguments)
    if reward_model is None:
        raise ConfigError("ppo.rewards names `model`, but there is no reward model; turn the reward stage on")
    return reward_model
