"""The section ``evaluate``: what is measured of the policies on held-out prompts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from rlhf.config.fields import NUMBERS_SAME, Count, NotNegative, OptionalStage, Scorers
from rlhf.metrics.labels import COMPONENT, LABELS


class Evaluate(OptionalStage):
    """Base, SFT and PPO policies on held-out prompts."""

    prompts: Count = Field(256, description="Held-out prompts to evaluate on (the first ones by hash).")
    temperature: NotNegative = Field(0.0, description="Sampling temperature; 0 is greedy.")
    max_new_tokens: Count = Field(53, description="Longest response, in tokens.")
    scorers: Scorers = Field(
        {},
        description="Further scores by name, never trained on: a function as in ppo.rewards, or {function, arguments}.",
    )
    judges: dict[str, str] = Field(
        {},
        description="Functions by name that compare two responses, as judge.function does; each is asked in both "
        "orders, and gives win rates.",
    )
    length_column: str | None = Field(
        None, description="Column of the prompts with the number of words that a response should have."
    )
    bootstrap: Count = Field(1000, description="Bootstrap resamples of each confidence interval.")
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(0.95, description="Level of the intervals.")
    batch_size: Count = Field(64, description="Prompts generated at once.", json_schema_extra=NUMBERS_SAME)

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        for name in sorted(self.scorers.keys() & LABELS.keys()):
            raise ValueError(
                f"scorers: {name!r} is a metric that every evaluation has ({LABELS[name].name}); choose another name, "
                f"such as `my_{name}: {{function: ...}}`"
            )
        for name in filter(lambda name: name.startswith(COMPONENT), self.scorers):
            raise ValueError(
                f"scorers: {name!r} begins with `{COMPONENT}`, as the rewards of PPO do among the metrics; choose "
                "another name"
            )
        for name, function in self.judges.items():
            if name in self.scorers or name in LABELS:
                raise ValueError(f"judges: {name!r} is the name of a score, too; choose another one")
            if ":" not in function:
                raise ValueError(
                    f"judges.{name} is {function!r}; must be a function of yours, `module:function` or "
                    "`file.py:function`"
                )
        return self
