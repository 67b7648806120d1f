"""The metrics of an update, and of a whole training. Averages are over real response tokens, or over episodes."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf.config.ppo_options import Settings
from rlhf.ppo import core
from rlhf.ppo.learner import Step
from rlhf.ppo.overoptimisation import ALARM
from rlhf.ppo.rollout import Experience, Rollout, Scored
from rlhf.ppo.state import Progress, Sample

SAMPLES = 16  # rows of one table


def metrics(
    rollout: Rollout,
    scored: Scored,
    experience: Experience,
    steps: Sequence[Step],
    total: core.Total,
) -> dict[str, float]:
    """The metrics that are functions of the seed.

    ``ppo/reward_*`` are of an episode's sum of rewards before any whitening, ``ppo/score_*`` of its score as it went
    into them, ``ppo/reward/<name>`` of one component before its weight; ``ppo/kl`` is in nats per sequence, by the
    unbiased k1 whatever estimator the rewards use, and ``ppo/kl_stderr`` its standard error. ``ppo/sampling_gap`` is
    the mean difference between the log-probabilities that decoding saw and those of a forward pass in the update's
    precision (0 in float32, where the former are used). The advantages are those before whitening. What comes from
    the optimizer steps is averaged over them (``ratio_max`` is the maximum; ``grad_norm`` leaves overflows out).
    """
    mask = rollout.sequences.mask
    every = torch.ones_like(rollout.ended)  # episodes have no mask

    def mean(values: Tensor) -> float:
        return core.moments(values.float(), every, total).mean.item()

    def spread(values: Tensor) -> float:
        return core.moments(values.float(), every, total).variance.sqrt().item()

    kl = core.kl_per_token(rollout.logprobs, scored.ref_logprobs, mask, "k1").sum(1)
    rewards = experience.rewards.sum(1)
    advantages = core.moments(experience.advantages, mask, total)
    result = {
        "reward_mean": mean(rewards),
        "reward_std": spread(rewards),
        "score_mean": mean(scored.scores),
        "score_std": spread(scored.scores),
        "kl": mean(kl),
        "kl_stderr": spread(kl) / math.sqrt(total(every.sum()).item()),
        "sampling_gap": core.moments((rollout.drawn_logprobs - rollout.logprobs).abs(), mask, total).mean.item(),
        "entropy": core.moments(rollout.entropies, mask, total).mean.item(),
        "explained_variance": core.explained_variance(scored.values, experience.returns, mask, total).item(),
        "advantage_mean": advantages.mean.item(),
        "advantage_std": advantages.variance.sqrt().item(),
        "response_length_mean": mean(rollout.sequences.response_lengths),
        "eos_rate": mean(rollout.ended),
    }
    result |= {f"reward/{name}": mean(values.to(mask.device)) for name, values in scored.components.items()}
    columns = zip(Step._fields[:-1], zip(*steps, strict=True), strict=False)
    result |= {name: average(values) for name, values in columns}
    result["ratio_max"] = max(step.ratio_max for step in steps)
    norms = [step.grad_norm for step in steps if not step.overflow]
    result["grad_norm"] = average(norms) if norms else math.nan
    return {f"ppo/{name}": value for name, value in result.items()}


def timings(seconds: Mapping[str, float], tokens: float) -> dict[str, float]:
    """The metrics that depend on the machine; ``tokens`` is the number of response tokens of all processes."""
    result = {f"ppo/seconds/{part}": value for part, value in seconds.items()}
    result["ppo/tokens_per_second"] = tokens / sum(seconds.values())
    result["ppo/peak_memory_bytes"] = float(peak_memory())
    return result


def peak_memory() -> int:
    """Most bytes so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def finals(progress: Progress, settings: Settings, best_metric: str) -> dict[str, float]:
    """The metrics of the whole training: means over the last tenth of its updates, at least one.

    With judges, ``ppo/overoptimised/<name>`` is 1 where the alarm of one was on at the last evaluation, else 0;
    ``ppo/overoptimised`` is that of any.
    """
    last = max(1, settings.updates // 10)
    result = {f"ppo/final_{name}": average(values[-last:]) for name, values in progress.history.items()}
    result["ppo/final_kl_coef"] = progress.kl_coef
    if progress.best is not None:
        result["ppo/best_update"] = float(progress.best.update)
        result[f"ppo/best_{best_metric}"] = progress.best.value
        result["ppo/best_kl"] = progress.best.kl
    alarms = {name: on for row in progress.evaluations[-1:] for name, on in row.items() if name.startswith(ALARM)}
    if alarms:
        result |= {f"ppo/{name}": on for name, on in alarms.items()} | {"ppo/overoptimised": max(alarms.values())}
    result["ppo/updates"] = float(settings.updates)
    result["ppo/episodes"] = float(settings.updates * settings.episodes)
    return result


def samples(update: int, rollout: Rollout, scored: Scored) -> list[Sample]:
    """The first rows of a rollout, for people to read."""
    rows = zip(rollout.prompts.texts, rollout.responses, scored.scores.tolist(), strict=True)
    return [Sample(update, prompt, response, score) for prompt, response, score in rows][:SAMPLES]


def average(values: Sequence[float]) -> float:
    """Their mean; there is at least one."""
    return sum(values) / len(values)
