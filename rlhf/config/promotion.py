"""The configuration's section ``promotion``, and which scores may decide about a promotion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from rlhf.config.fields import Fraction, FunctionSpec, NotNegative, Positive, Section

if TYPE_CHECKING:
    from rlhf.config.pipeline import PipelineConfig


class Promotion(Section):
    """When a candidate takes the place of the champion; none of it is in a cache key.

    Both answer the same held-out prompts; the first candidate has its own SFT policy to beat.
    """

    judge: str = Field(
        "held_out",
        min_length=1,
        description="Score that decides, `held_out` or one of evaluate.scorers; never what PPO was trained on.",
    )
    margin: NotNegative = Field(
        0.0, description="The candidate's mean score must be above the champion's by more than this, surely."
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        0.95, description="How sure: of equal policies, at most 1 - confidence are promoted."
    )
    min_prompts: Annotated[int, Field(ge=2)] = Field(30, description="Fewest held-out prompts that decide anything.")
    kl_budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        50.0, description="Most KL to the reference policy, in nats per response. null: any."
    )
    rouge_floor: Fraction | None = Field(
        0.05, description="Most that ROUGE-L may fall below the champion's, where there are references. null: any."
    )
    refuse_overoptimised: bool = Field(
        True, description="Refuse a candidate in whose training the reward rose while a judge's score fell."
    )
    approval: bool = Field(False, description="Ask a person in Prefect's UI before the champion changes.")
    approval_hours: Positive = Field(24.0, description="How long to wait for that person; then it is a refusal.")


def conflict(config: PipelineConfig) -> str | None:
    """Why ``promotion.judge`` cannot decide about policies of this configuration; None where it can."""
    judge = config.promotion.judge
    trained = trained_on(config)
    allowed = [name for name in config.evaluate.scorers if name not in trained]
    if judge == "held_out" or judge in allowed:
        return None
    allowed += ["held_out"] if config.reward.enabled and config.reward.held_out else []
    rule = f"it may be one of: {', '.join(allowed) or 'none yet'}; add others to evaluate.scorers"
    if judge in trained or (config.ppo.enabled and judge in ("reward", *config.ppo.rewards)):
        return f"promotion.judge is {judge!r}, which PPO is trained on (ppo.rewards), so that it proves nothing; {rule}"
    return f"promotion.judge is {judge!r}, and there is no such score; {rule}"


def trained_on(config: PipelineConfig) -> list[str]:
    """The scorers of ``evaluate`` that PPO is trained on: those with the function and arguments of a reward."""
    rewards = [_whole(spec) for spec in config.ppo.rewards.values()] if config.ppo.enabled else []
    return [name for name, spec in config.evaluate.scorers.items() if _whole(spec) in rewards]


def _whole(spec: FunctionSpec) -> tuple[str, dict[str, Any]]:
    """A function and all its arguments, those that a built-in has by default included."""
    from rlhf.rewards import registry  # not at the top: most stages have no rewards among their code

    defaults = registry.find(spec.function).defaults if registry.is_builtin(spec.function) else {}
    return spec.function, defaults | spec.arguments
