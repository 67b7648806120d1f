"""The schema of the whole pipeline.

One set of pydantic models is the YAML file, the ``--set ppo.kl_coef=0.1`` of the command line and the form of the
Prefect UI. All models are frozen and refuse unknown keys. Every field says its unit. A field marked ``NUMBERS_SAME``
changes how a stage computes, not what: it is not part of the stage's cache key.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from rlhf.config.data import KINDS, Data
from rlhf.config.evaluate import Evaluate
from rlhf.config.fields import Section
from rlhf.config.judge import Judge
from rlhf.config.model import Model
from rlhf.config.ppo import Ppo
from rlhf.config.promotion import Promotion
from rlhf.config.resources import Resources
from rlhf.config.supervised import Reward, Sft


class Tracking(Section):
    """Where metrics go; none of it is in a cache key."""

    enabled: bool = Field(
        True, description="Whether runs go to MLflow; when false, their journals stay on this machine, unsent."
    )
    uri: str | None = Field(
        None, description="MLflow tracking URI; default: a SQLite file in the home folder. Never put credentials here."
    )
    experiment: str = Field("rlhf", min_length=1, description="MLflow experiment.")


class PipelineConfig(Section):
    """The whole pipeline: dataset preparation, SFT, judging, reward model, PPO, evaluation."""

    name: str = Field(
        "pipeline", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Name of the pipeline, used in run names."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Seed of everything random.")
    data: Data
    model: Model
    sft: Sft = Sft()
    judge: Judge = Judge()
    reward: Reward = Reward()
    ppo: Ppo = Ppo()
    evaluate: Evaluate = Evaluate()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()
    promotion: Promotion = Promotion()

    @model_validator(mode="after")
    def _check(self) -> PipelineConfig:
        data, needs = self.data, "which names no file and no row"
        pairs = data.has("preferences") or data.has("labelled")
        if not any(map(data.has, KINDS)):
            raise ValueError("data names no file; set data.demonstrations, data.prompts or data.preferences")
        if self.sft.enabled and not data.has("demonstrations"):
            raise ValueError(f"sft needs data.demonstrations, {needs}; or leave it out with `sft: off`")
        if self.ppo.enabled and self.ppo.uses_model and not self.reward.enabled:
            raise ValueError(
                "ppo.rewards names `model`, but the reward stage is off; turn it on or name a Python function"
            )
        by_held_out = self.ppo.enabled and self.ppo.eval_every and self.ppo.best_metric == "judge/held_out"
        if by_held_out and not (self.reward.enabled and self.reward.held_out):
            raise ValueError(
                "ppo.best_metric is `judge/held_out`, but no held-out reward model is trained; set reward.held_out, or "
                "choose by `score` or by one of ppo.judges"
            )
        self._check_preferences(pairs, needs)
        if (self.ppo.enabled or self.evaluate.enabled) and not (data.has("demonstrations") or data.has("prompts")):
            raise ValueError("ppo and evaluate need prompts: set data.prompts or data.demonstrations")
        if problem := (
            self._dtype_conflict()
            or self.resources.conflict(self.sft, self.reward, self.ppo)
            or self.promotion.conflict(self.evaluate, self.reward, self.ppo)
        ):
            raise ValueError(problem)
        if self.model.init == "random":
            for stage in ("ppo", "evaluate"):
                new = getattr(self, stage).max_new_tokens
                if new >= self.model.context:
                    raise ValueError(
                        f"{stage}.max_new_tokens {new} leaves no room for a prompt in model.context "
                        f"{self.model.context}"
                    )
        return self

    def _check_preferences(self, pairs: bool, needs: str) -> None:
        """See that the judge and the reward model have something to learn from."""
        data, judge, learns = self.data, self.judge, self.reward.enabled
        regression = self.reward.objective == "regression"
        if learns and not regression and not (pairs or judge.makes("preferences")):
            raise ValueError(
                f"reward needs data.preferences, {needs}; or leave it out with `reward: off`, let the judge make "
                "pairs, or learn from ratings with reward.objective: regression"
            )
        if learns and regression and not (data.has("ratings") or judge.makes("ratings")):
            raise ValueError(f"reward.objective `regression` needs data.ratings, {needs}, or judge.gives: ratings")
        if not judge.enabled:
            return
        ratings = judge.by == "model" and judge.model.objective == "regression"
        if not judge.samples and not pairs:
            raise ValueError(
                f"judge needs data.preferences, {needs}; or set judge.samples, or leave it out with `judge: off`"
            )
        if judge.by == "model" and not (data.has("ratings") if ratings else pairs):
            raise ValueError(f"judge.by `model` learns from data.{'ratings' if ratings else 'preferences'}, {needs}")
        if judge.samples and not (data.has("demonstrations") or data.has("prompts")):
            raise ValueError("judge.samples needs prompts: set data.prompts or data.demonstrations")

    def _dtype_conflict(self) -> str | None:
        dtype = self.model.dtype
        trains = [stage for stage in ("sft", "reward", "ppo") if getattr(self, stage).enabled]
        if dtype == "float32" or not trains:
            return None
        if not self.model.lora_rank:
            return (
                f"model.dtype `{dtype}` is for frozen weights, but {trains[0]} trains all of them, and small steps "
                "would be rounded away; set model.lora_rank, or leave model.dtype at `float32` and set "
                "resources.precision, which computes in half precision"
            )
        if dtype == "float16" and self.resources.precision != "fp16":
            return (
                f"model.dtype is `float16`, and resources.precision `{self.resources.precision}` has no loss scaling, "
                "without which small gradients vanish; set resources.precision: fp16, or model.dtype: bfloat16"
            )
        return None
