"""How models are trained on given texts: the sections ``sft`` and ``reward``, and the training of a judge model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.fields import BY_CONTENT, NUMBERS_SAME, Count, Fraction, NotNegative, OptionalStage, Positive


class Supervised(OptionalStage):
    """What the two supervised trainings share."""

    epochs: Positive = Field(1.0, description="Passes over the training rows.")
    max_steps: Count | None = Field(None, description="Stop after this many optimizer steps, whatever epochs says.")
    batch_size: Count = Field(32, description="Examples per optimizer step.")
    micro_batch_size: Count | None = Field(
        None, description="Examples per forward pass; less needs less memory. Default: batch_size."
    )
    learning_rate: Positive = Field(1e-4, description="Peak learning rate of AdamW.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="Decay of the learning rate.")
    warmup_fraction: Fraction = Field(0.05, description="Share of the steps over which the learning rate rises.")
    weight_decay: NotNegative = Field(0.0, description="AdamW weight decay.")
    beta2: Annotated[float, Field(gt=0, lt=1)] = Field(0.999, description="AdamW second-moment decay.")
    max_grad_norm: Positive = Field(1.0, description="Gradients are clipped to this global norm.")
    log_every: Count = Field(10, description="Optimizer steps between two points of a curve.")
    checkpoint_every: Count = Field(
        200, description="Optimizer steps between two checkpoints.", json_schema_extra=NUMBERS_SAME
    )

    @model_validator(mode="after")
    def _check_batches(self) -> Supervised:
        micro = self.micro_batch_size
        if micro is not None and (micro > self.batch_size or self.batch_size % micro):
            raise ValueError(f"micro_batch_size {micro} must divide batch_size {self.batch_size}")
        return self


class Sft(Supervised):
    """Supervised fine-tuning on the demonstrations; the loss counts response tokens only."""


class RewardTraining(Supervised):
    """How a model learns to score, from preference pairs and rankings, or from ratings."""

    objective: Literal["pairwise", "regression"] = Field(
        "pairwise",
        description="`pairwise` learns which response of a pair is better (Bradley-Terry loss); `regression` predicts "
        "ratings (squared error).",
    )
    path: str | None = Field(
        None,
        description="Start from this model instead of the SFT policy: local directory or hub id.",
        json_schema_extra=BY_CONTENT,
    )
    center: NotNegative = Field(
        0.0, description="Weight of the auxiliary loss that keeps the scores of a pair centred around zero."
    )
    normalize_std: bool = Field(
        False, description="Also divide scores by the standard deviation over the SFT references (mean 0 always)."
    )

    @model_validator(mode="after")
    def _check_center(self) -> RewardTraining:
        if self.objective == "regression" and self.center:
            raise ValueError(
                f"center is {self.center}, but it is for pairs: a regression has the level of its ratings; "
                "set center: 0 or objective: pairwise"
            )
        return self


class Reward(RewardTraining):
    """Reward-model training on preference pairs and rankings, or on ratings."""

    held_out: bool = Field(
        True,
        description="Also train a second model with another seed, which PPO never sees: it judges policies, so that "
        "over-optimisation of the first one shows. It doubles the time and the disk space of the stage.",
    )
