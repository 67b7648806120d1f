"""The configuration's section ``promotion``, and which scores may decide about a promotion."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from rlhf.config.evaluate import Evaluate
from rlhf.config.fields import Fraction, FunctionSpec, NotNegative, Positive, Section
from rlhf.config.ppo import Ppo
from rlhf.config.supervised import Reward
from rlhf.rewards import registry


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

    def conflict(self, evaluate: Evaluate, reward: Reward, ppo: Ppo) -> str | None:
        """Why ``judge`` cannot decide about the policies of a configuration; None where it can."""
        trained = trained_on(evaluate, ppo)
        allowed = [name for name in evaluate.scorers if name not in trained]
        if self.judge == "held_out" or self.judge in allowed:
            return None
        allowed += ["held_out"] if reward.enabled and reward.held_out else []
        rule = f"it may be one of: {', '.join(allowed) or 'none yet'}; add others to evaluate.scorers"
        if self.judge in trained or (ppo.enabled and self.judge in ("reward", *ppo.rewards)):
            return (
                f"promotion.judge is {self.judge!r}, which PPO is trained on (ppo.rewards), so that it proves nothing; "
                f"{rule}"
            )
        return f"promotion.judge is {self.judge!r}, and there is no such score; {rule}"


def trained_on(evaluate: Evaluate, ppo: Ppo) -> list[str]:
    """The scorers of ``evaluate`` that PPO is trained on: those with the function and arguments of a reward."""
    rewards = [_whole(spec) for spec in ppo.rewards.values()] if ppo.enabled else []
    return [name for name, spec in evaluate.scorers.items() if _whole(spec) in rewards]


def _whole(spec: FunctionSpec) -> tuple[str, dict[str, Any]]:
    """A function and all its arguments, those that a built-in has by default included."""
    defaults = registry.find(spec.function).defaults if registry.is_builtin(spec.function) else {}
    return spec.function, defaults | spec.arguments
