"""Evaluation during training: how the policy does on held-out prompts, and whether it is the best so far."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config.ppo_options import Settings
from rlhf.errors import ConfigError, TrainingError
from rlhf.ppo import batching
from rlhf.ppo.batching import Prompts
from rlhf.ppo.generation import GREEDY
from rlhf.ppo.overoptimisation import standard_error
from rlhf.ppo.policy import Policy, exact_kl
from rlhf.ppo.rollout import collect, per_token
from rlhf.rewards import Rewards, Scorer

log = logging.getLogger(__name__)

JUDGE = "judge/"  # begins the name of a judge's score among the metrics


class Best(NamedTuple):
    """The best evaluation so far: its update, what it had of the metric, and its KL to the reference."""

    update: int
    value: float
    kl: float


def best_metric(settings: Settings, judges: Mapping[str, Scorer]) -> str:
    """What the best policy has most of: ``best_metric``; where that is left open, the held-out judge, or the score."""
    default = "judge/held_out" if "held_out" in judges else "score"
    return default if settings.best_metric is None else settings.best_metric


def planned(settings: Settings) -> int:
    """How many evaluations a training makes: before its first update, every ``eval_every``, and after the last one."""
    return 1 + math.ceil(settings.updates / settings.eval_every)


def check(
    settings: Settings, held_out: Prompts | None, rewards: Rewards, judges: Mapping[str, Scorer], processes: int
) -> None:
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
    allowed = ["score", *(f"reward/{name}" for name in rewards.parts), *(f"judge/{name}" for name in judges)]
    if best_metric(settings, judges) not in allowed:
        raise ConfigError(f"ppo.best_metric is {settings.best_metric!r}; allowed are {', '.join(allowed)}")


def measure(
    settings: Settings,
    policy: Policy,
    reference: Policy,
    rewards: Rewards,
    judges: Mapping[str, Scorer],
    held_out: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Numbers of the responses to the first ``eval_prompts`` held-out prompts, n of them: each (n,), float64.

    ``score`` is the weighted sum of the rewards as they gave it; ``kl`` the KL to the reference in nats per sequence,
    exact over the vocabulary at each token (at the sampling temperature, or that of training where decoding is greedy);
    ``judge/<name>`` what a judge says. The draws are the same in every evaluation, so that two differ by their
    policies. Every process gets the numbers of all prompts.

    Raises:
        RewardError: a reward or judge failed.
        TrainingError: a number is not finite.
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
    asked = made.prompts.texts, made.responses, made.prompts.columns
    scores, components = rewards(*asked)
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
        **{f"{JUDGE}{name}": torch.tensor(judge(*asked)) for name, judge in judges.items()},
    }
    table = torch.zeros(len(columns), count, dtype=torch.float64, device=accelerator.device)
    table[:, mine] = torch.stack([values.to(table) for values in columns.values()])
    if accelerator.num_processes > 1:
        table = accelerator.reduce(table, "sum")  # each prompt is one process's, and 0 in the others
    found = dict(zip(columns, table.cpu(), strict=True))
    if odd := [name for name, values in found.items() if not torch.isfinite(values).all()]:
        raise TrainingError(f"evaluation on held-out prompts: {', '.join(odd)} is not finite")
    return found


def summary(columns: Mapping[str, Tensor]) -> dict[str, float]:
    """The means over the prompts; of the score and of each judge the standard error of that, too (``_stderr``)."""
    found: dict[str, float] = {}
    for name, values in columns.items():
        found[name] = values.mean().item()
        if name == "score" or name.startswith(JUDGE):
            found[f"{name}_stderr"] = standard_error(values)
    return found


def judged(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The judges' columns, by their names."""
    return {name.removeprefix(JUDGE): values for name, values in columns.items() if name.startswith(JUDGE)}


def better(
    metrics: Mapping[str, float], update: int, settings: Settings, metric: str, best: Best | None
) -> Best | None:
    """This evaluation, if it is within the KL budget and has more of a metric than the best so far; else None.

    The policy before the first update is never the best: a training is to give a trained policy, and what uses the
    result compares the two.
    """
    found = Best(update, metrics[metric], metrics["kl"])
    within = settings.kl_budget is None or found.kl <= settings.kl_budget
    return found if update and within and (best is None or found.value > best.value) else None


def warn_if_no_better(evaluations: Sequence[Mapping[str, float]], metric: str, best: Best) -> None:
    """Say so where the best policy has no more of the metric than the one before the first update had."""
    before = evaluations[0]
    if before["update"] == 0 and best.value <= before[metric]:
        log.warning(
            "no policy has more of %s than the one before training (%.4g): the best, of update %d, has %.4g",
            metric,
            before[metric],
            best.update,
            best.value,
        )
