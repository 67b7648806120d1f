"""The section ``ppo``: the options of the PPO engine, and what the policy is trained on and watched by."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import Field, create_model, model_validator

from rlhf.config.fields import NUMBERS_SAME, OptionalStage, Rewards, RewardSpec, Scorers
from rlhf.config.ppo_options import Settings, conflict
from rlhf.rewards.registry import labels


class _PpoSection(OptionalStage):
    """Proximal policy optimisation of the policy against the reward, held near the SFT policy by a KL penalty."""

    rewards: Rewards = Field(
        {"model": RewardSpec(function="model")},
        description="Each reward's weight, or {weight, function, arguments}. Its name is its function: `model` (the "
        "trained one), a built-in, `module:function` or `file.py:function`.",
    )

    judges: Scorers = Field(
        {},
        description="Scores by name that each evaluation during training measures and nothing is trained on: a "
        "function as in ppo.rewards, or {function, arguments}. The held-out reward model is one by itself, `held_out`.",
    )

    @model_validator(mode="after")
    def _check(self) -> _PpoSection:
        options: Any = self  # which has those of the engine, too
        if problem := conflict(options):
            raise ValueError(problem)
        if self.enabled and not self.rewards:
            raise ValueError("rewards is empty; name at least one, e.g. {model: 1.0}")
        if "held_out" in self.judges:
            raise ValueError("judges: `held_out` is the held-out reward model's name; choose another one")
        allowed = ["score", *(f"reward/{label}" for label in labels(self.rewards).values())]
        allowed += [f"judge/{name}" for name in ("held_out", *self.judges)]
        if options.eval_every and options.best_metric is not None and options.best_metric not in allowed:
            raise ValueError(f"best_metric is {options.best_metric!r}; allowed are {', '.join(allowed)}")
        return self

    @property
    def uses_model(self) -> bool:
        """Whether the trained reward model is one of the rewards."""
        return any(reward.function == "model" for reward in self.rewards.values())


def _options(settings: type) -> dict[str, Any]:
    """The fields of a dataclass of options as fields of a section."""
    types, found = get_type_hints(settings), {}
    for option in fields(settings):
        limits = dict(option.metadata)
        extra = NUMBERS_SAME if limits.pop("numbers_same") else None
        if "float" in str(types[option.name]):
            limits["allow_inf_nan"] = False
        found[option.name] = (types[option.name], Field(option.default, json_schema_extra=extra, **limits))
    return found


if TYPE_CHECKING:

    class Ppo(_PpoSection, Settings):
        """The section with the options of the PPO engine."""
else:
    Ppo = create_model(
        "Ppo", __base__=_PpoSection, __doc__=_PpoSection.__doc__, __module__=__name__, **_options(Settings)
    )
