"""The section ``judge``: who says which of two responses is better."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.fields import NUMBERS_SAME, Count, NotNegative, OptionalStage, Positive, Rewards
from rlhf.config.supervised import RewardTraining


class Judge(OptionalStage):
    """Makes preferences: passes people's on, or judges pairs or samples of the SFT policy, and measures agreement."""

    by: Literal["people", "rewards", "comparison", "model"] = Field(
        "people",
        description="`people`: pairs are passed on as they are labelled; `rewards`: the higher score of judge.rewards "
        "is better; `comparison`: judge.function compares two responses; `model`: a judge model learns people's labels "
        "first, and its scores judge.",
    )
    rewards: Rewards = Field({}, description="Of `rewards`: the weight of each function, as in ppo.rewards.")
    function: str | None = Field(
        None,
        description="Of `comparison`: `module:function` of (prompts, firsts, seconds, **columns), which gives one "
        "number a row, above 0 where the first response is better. It is asked in both orders.",
    )
    model: RewardTraining = Field(
        RewardTraining(), description="Of `model`: the training of the judge model, as in section reward."
    )
    samples: Annotated[int, Field(ge=0)] = Field(
        0, description="Responses sampled from the SFT policy to each prompt; 0 judges the pairs of the data."
    )
    with_reference: bool = Field(False, description="Whether a prompt's reference is judged beside its samples.")
    prompts: Count | None = Field(None, description="Sample for at most this many prompts of each split.")
    temperature: Positive = Field(1.0, description="Sampling temperature.")
    max_new_tokens: Count = Field(53, description="Longest sampled response, in tokens.")
    batch_size: Count = Field(64, description="Prompts sampled at once.", json_schema_extra=NUMBERS_SAME)
    gives: Literal["pairs", "rankings", "ratings"] = Field(
        "pairs",
        description="What is made of the judged responses to a prompt: the best and the worst of them as a pair, all "
        "pairs of them, or each with its score.",
    )
    min_margin: NotNegative = Field(
        0.0, description="Responses whose scores differ by no more than this make no pair: it is a tie."
    )
    annotators: tuple[str, ...] = Field(
        (), description="Columns that hold each annotator's verdict (`chosen` or `rejected`), for the agreement."
    )
    source: str | None = Field(None, description="Column of the pairs by which the agreement with people is reported.")

    @model_validator(mode="after")
    def _check(self) -> Judge:
        if self.by == "people" and (self.samples or self.gives != "pairs"):
            raise ValueError(
                "by is `people`, who judged the pairs of the data already; set by to rewards, comparison or model, or "
                "leave samples and gives out"
            )
        if (self.by == "rewards") != bool(self.rewards):
            raise ValueError(f"rewards must be given for by: rewards, and for nothing else; by is `{self.by}`")
        if (self.by == "comparison") != bool(self.function):
            raise ValueError(f"function must be given for by: comparison, and for nothing else; by is `{self.by}`")
        if self.by == "comparison" and self.gives == "ratings":
            raise ValueError("gives is `ratings`, but a comparison gives no scores; set gives to pairs or rankings")
        if self.with_reference and not self.samples:
            raise ValueError("with_reference is for samples; set samples, or leave it out")
        if self.samples == 1 and not self.with_reference:
            raise ValueError("samples is 1, which makes no pair; set at least 2, or with_reference: true")
        if any(reward.function == "model" for reward in self.rewards.values()):
            raise ValueError("rewards: `model` is the reward model, which is trained later; set by: model for a judge")
        return self

    def makes(self, kind: str) -> bool:
        """Whether it writes `preferences` or `ratings`."""
        return self.enabled and self.by != "people" and (self.gives == "ratings") == (kind == "ratings")
