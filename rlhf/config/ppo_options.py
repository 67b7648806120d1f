"""What can be chosen in a PPO training: every option with its default, its unit and its limits.

The pipeline's configuration has the same options (``rlhf.config.pipeline.Ppo`` is made from this class), so that there
is one list of them. The class itself needs nothing but the standard library. docs/ppo.md gives the source of each
option.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rlhf.errors import ConfigError

Generation = Literal["auto", "dynamic", "static", "transformers"]


def option(default: Any, description: str, numbers_same: bool = False, **limits: float) -> Any:
    """A field: its default, what it is, and limits (``gt``, ``ge``, ``le``) that a number must keep.

    ``numbers_same`` marks what changes how a training computes, not what.
    """
    return field(default=default, metadata={"description": description, "numbers_same": numbers_same, **limits})


@dataclass(frozen=True)
class Settings:
    """The options of ``Trainer``.

    Raises:
        ConfigError: a value is none of those allowed, or two options do not go together.
    """

    updates: int = option(100, "Number of PPO updates (rollout, then optimisation).", ge=1)
    episodes: int = option(64, "Prompts, with one response each, per update.", ge=1)
    epochs: int = option(4, "Passes over each rollout.", ge=1)
    minibatches: int = option(1, "Optimizer steps per pass; must divide episodes.", ge=1)
    micro_batch_tokens: int = option(
        16384, "Most tokens (padding included) in one forward pass of the update; bounds the memory.", True, ge=1
    )

    max_new_tokens: int = option(53, "Longest response, in tokens, the end-of-sequence token included.", ge=1)
    temperature: float = option(0.7, "Sampling temperature; every log-probability is taken at it.", gt=0)
    generation: Generation = option(  # noqa: RUF009 (it makes a field)
        "auto",
        "How responses are decoded: dropping finished rows (`dynamic`), in place with a CUDA graph for each step "
        "(`static`), or `transformers`, its plain `generate`. `auto`: static on CUDA where the model allows it.",
        True,
    )

    generation_batch: int | None = option(
        None, "Responses decoded at once: bounds the memory of keys and values. Default: all of a process.", True, ge=1
    )

    learning_rate: float = option(3e-6, "Peak learning rate of AdamW for the policy.", gt=0)
    value_learning_rate: float | None = option(
        None, "Same for the value model (or head). Default: learning_rate.", gt=0
    )
    schedule: Literal["linear", "constant"] = option("linear", "Decay of the learning rate over all updates.")
    lr_target_kl: float | None = option(
        None,
        "Adapt the policy's learning rate to this approx KL (nats per token, mean over an update's steps): divided by "
        "1.5 above twice of it, multiplied by 1.5 below half of it. Default: off.",
        gt=0,
    )
    warmup_updates: int = option(0, "First updates in which only the value model learns.", ge=0)
    adam_eps: float = option(1e-5, "AdamW epsilon.", gt=0)
    weight_decay: float = option(0.0, "AdamW weight decay.", ge=0)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this global norm.", gt=0)

    kl_coef: float = option(0.05, "Weight beta of the per-token KL penalty, in reward per nat.", ge=0)
    kl_control: Literal["fixed", "adaptive"] = option(
        "fixed", "Whether beta stays, or follows Ziegler's proportional controller towards kl_target."
    )
    kl_target: float = option(6.0, "Target of the adaptive controller, in nats per sequence.", gt=0)
    kl_horizon: float = option(10000.0, "Horizon of the adaptive controller, in episodes.", gt=0)
    kl_estimator: Literal["k1", "k2", "k3"] = option("k1", "Estimator of the per-token KL in the reward.")

    gamma: float = option(1.0, "Discount per token.", ge=0, le=1)
    lam: float = option(0.95, "Lambda of generalized advantage estimation.", ge=0, le=1)
    clip_range: float = option(0.2, "Clip of the probability ratio.", gt=0)
    value_clip_range: float = option(0.2, "Clip of the value around the rollout's value.", gt=0)
    value_coef: float = option(0.1, "Weight of the value loss.", ge=0)
    entropy_coef: float = option(0.0, "Weight of an entropy bonus.", ge=0)
    early_stop_kl: float | None = option(
        None, "End an update before a step at which approx KL (nats per token) is over 1.5 times this.", gt=0
    )
    value_model: Literal["separate", "shared"] = option(
        "separate",
        "A value model of its own, initialised from the reward model where that fits; or, cheaper, a value head on the "
        "policy's trunk.",
    )

    whiten_advantages: bool = option(True, "Advantages to mean 0, variance 1 over a rollout's tokens.")
    whiten_rewards: bool = option(False, "Rewards to variance 1 over a rollout's tokens, mean kept.")
    scale_scores: bool = option(False, "Divide scores by their running standard deviation, before score_clip.")
    score_clip: float | None = option(None, "Clip scores to plus or minus this value.", gt=0)
    missing_eos: Literal["off", "replace", "penalty"] = option(
        "off", "A response that did not end within the limit: leave its score, replace it, or subtract."
    )
    missing_eos_value: float = option(
        -1.0, "Score of such a response when missing_eos is `replace`; amount subtracted is its magnitude."
    )

    eval_every: int = option(
        0, "Updates between two evaluations on held-out prompts, the first before training; 0 is never.", ge=0
    )
    eval_prompts: int = option(64, "Held-out prompts of an evaluation (the first ones).", ge=1)
    eval_temperature: float | None = option(
        None, "Sampling temperature of the evaluations; 0 is greedy. Default: temperature.", ge=0
    )
    best_metric: str | None = option(
        None,
        "What the best policy has most of: `score`, `reward/<name>` for one component, or `judge/<name>`. Default: "
        "`judge/held_out` where there is a held-out reward model, else `score`.",
    )
    kl_budget: float | None = option(
        None, "The best policy is sought among those within this KL to the reference (nats per sequence).", gt=0
    )
    log_samples_every: int = option(10, "Updates between two tables of samples.", ge=1)
    checkpoint_every: int = option(10, "Updates between two checkpoints.", True, ge=1)

    def __post_init__(self) -> None:
        kinds = get_type_hints(Settings)
        for option in fields(self):
            value, kind = getattr(self, option.name), kinds[option.name]
            allowed = get_args(kind) if get_origin(kind) is Literal else (value,)
            problem = _beyond(value, option.metadata) if value in allowed else f"allowed are {', '.join(allowed)}"
            if problem:
                raise ConfigError(f"ppo.{option.name} is {value!r}; {problem}")
        if problem := conflict(self):
            raise ConfigError(f"ppo: {problem}")


def conflict(settings: Settings) -> str | None:
    """Which options do not go together, and what to do; None if all do."""
    s = settings
    if s.episodes % s.minibatches:
        return f"minibatches {s.minibatches} must divide episodes {s.episodes}"
    if s.warmup_updates >= s.updates:
        return (
            f"warmup_updates {s.warmup_updates} leaves none of the {s.updates} updates for the policy; "
            "lower it, or raise updates"
        )
    if s.warmup_updates and s.value_model == "shared":
        return (
            f"warmup_updates {s.warmup_updates} trains the value model alone, but with value_model: shared its trunk "
            "is the policy's; set warmup_updates: 0 or value_model: separate"
        )
    if s.lr_target_kl is not None and s.epochs * s.minibatches == 1:
        return (
            "lr_target_kl needs more than one optimizer step per update: at the first step the approx KL is always 0; "
            "raise epochs or minibatches, or leave it out"
        )
    if s.kl_budget is not None and not s.eval_every:
        return f"kl_budget {s.kl_budget} is for choosing the best evaluated policy, but eval_every is 0; set eval_every"
    return None


def _beyond(value: Any, limits: Any) -> str | None:
    """Which limit a value breaks, in words."""
    if isinstance(value, float) and not math.isfinite(value):
        return "it must be a finite number"
    if isinstance(value, str | bool) or value is None:
        return None
    if "gt" in limits and not value > limits["gt"]:
        return f"it must be over {limits['gt']}"
    if "ge" in limits and value < limits["ge"]:
        return f"it must be at least {limits['ge']}"
    if "le" in limits and value > limits["le"]:
        return f"it must be at most {limits['le']}"
    return None
