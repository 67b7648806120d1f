"""Evaluation during training: how the policy does on held-out prompts, and whether it is the best so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.errors import ConfigError, TrainingError
from rlhf.ppo import batching
from rlhf.ppo.batching import Prompts
from rlhf.ppo.generation import GREEDY
from rlhf.ppo.policy import Policy, exact_kl
from rlhf.ppo.rollout import collect, per_token
from rlhf.ppo.settings import Settings
from rlhf.rewards import Rewards


class Best(NamedTuple):
    """The best evaluation so far: its update, what it had of ``best_metric``, and its KL to the reference."""

    update: int
    value: float
    kl: float


def check(settings: Settings, held_out: Prompts | None, rewards: Rewards, processes: int) -> None:
    """See that evaluations are possible.

    Raises:
        ConfigError: there are too few held-out prompts, or no such metric.
    """
    count = min(settings.eval_prompts, 0 if held_out is None else len(held_out))
    if count < processes:
        raise ConfigError(
            f"ppo.eval_every is {settings.eval_every}, but {processes} process(es) have {count} held-out prompts; "
            "give more (data.validation_fraction, ppo.eval_prompts), or set ppo.eval_every: 0"
        )
    allowed = ["score", *(f"reward/{name}" for name in rewards.parts)]
    if settings.best_metric not in allowed:
        raise ConfigError(f"ppo.best_metric is {settings.best_metric!r}; allowed are {', '.join(allowed)}")


def metrics(
    settings: Settings,
    policy: Policy,
    reference: Policy,
    rewards: Rewards,
    held_out: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Means over the responses to the first ``eval_prompts`` held-out prompts.

    ``score`` is the weighted sum of the rewards as they gave it; ``kl`` the KL to the reference in nats per sequence,
    exact over the vocabulary at each token (at the sampling temperature, or that of training where decoding is greedy).
    The draws are the same in every evaluation, so that two differ by their policies.
    """
    s = settings
    temperature = s.temperature if s.eval_temperature is None else s.eval_temperature
    count = min(s.eval_prompts, len(held_out))
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    uniforms = torch.rand(count, s.max_new_tokens, generator=batching.generator(seed, "evaluate"))[mine]
    made = collect(
        policy,
        tokenizer,
        held_out.select(range(count)[mine]),
        uniforms,
        temperature or GREEDY,
        torch.device(accelerator.device),
        s.generation,
        s.generation_batch,
    )
    scores, components = rewards(made.prompts.texts, made.responses, made.prompts.columns)
    kl = per_token(
        lambda part: exact_kl(policy, reference, temperature or s.temperature, part),
        made.sequences,
        s.micro_batch_tokens,
    )
    columns: dict[str, Tensor] = {
        "score": scores,
        "kl": kl.sum(1),
        "response_length_mean": made.sequences.response_lengths,
        "eos_rate": made.ended,
        **{f"reward/{name}": values for name, values in components.items()},
    }
    sums = torch.stack([values.double().sum().to(accelerator.device) for values in columns.values()])
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums, "sum")
    means = dict(zip(columns, (sums / count).tolist(), strict=True))
    if odd := [name for name, value in means.items() if not math.isfinite(value)]:
        raise TrainingError(f"evaluation on held-out prompts: {', '.join(odd)} is not finite")
    return means


def better(metrics: Mapping[str, float], update: int, settings: Settings, best: Best | None) -> Best | None:
    """This evaluation, if it is within the KL budget and better than the best so far; else None."""
    found = Best(update, metrics[settings.best_metric], metrics["kl"])
    within = settings.kl_budget is None or found.kl <= settings.kl_budget
    return found if within and (best is None or found.value > best.value) else None
