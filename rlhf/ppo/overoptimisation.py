"""Whether a policy is over-optimised: the score that it is trained on rises while a judge that it never saw falls.

Gao, Schulman and Hilton 2023 (arXiv 2210.10760) draw both over sqrt(KL): the proxy goes on rising where the gold score
has passed its peak. Here the peak is the evaluation at which a judge's mean was highest so far, and each later
evaluation is compared with it. All evaluations answer the same n prompts with the same random numbers, so that the
comparison is of paired differences, one a prompt. The alarm of a judge is on at an evaluation where both hold:

    mean(proxy - proxy at the peak) >  c * se        mean(judge - judge at the peak) < -c * se

each with the standard error of its own differences. c is a quantile of Student's t distribution for n - 1 degrees of
freedom: the one that a single comparison exceeds by chance with probability ``LEVEL`` / (k (k - 1) / 2), where k is the
number of evaluations that the training will have made. So the choice of the peak among noisy means and the many looks
are paid for (Bonferroni, over all pairs of evaluations): of trainings in which a judge's expected score never falls,
at most ``LEVEL`` ever see its alarm, however the evaluations depend on each other. The same holds where the proxy never
rises, as both must be seen (Berger 1982, an intersection-union test).

Shapes: n held-out prompts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ALARM = "overoptimised/"  # begins the name of a judge's alarm among the metrics of an evaluation
LEVEL = 0.05  # of healthy trainings, the share that may see a judge's alarm
FEWEST = 8  # prompts: of fewer, a standard error says too little, and there is no alarm


class Peak(NamedTuple):
    """The evaluation at which a judge's mean was highest so far; the earliest of those. Each list is (n,)."""

    update: int
    proxy: list[float]
    judge: list[float]


def standard_error(values: Tensor) -> float:
    """Of the mean of (n,) independent values: their standard deviation (over n - 1) / sqrt(n). NaN for n = 1."""
    return math.nan if len(values) < 2 else values.std(correction=1).item() / math.sqrt(len(values))


def threshold(evaluations: int, prompts: int) -> float:
    """How many standard errors a mean difference must exceed; infinite for fewer than ``FEWEST`` prompts."""
    if prompts < FEWEST:
        return math.inf
    from scipy.special import stdtrit  # here, as a training without judges needs no SciPy

    comparisons = max(1, evaluations * (evaluations - 1) // 2)
    return -float(stdtrit(prompts - 1, LEVEL / comparisons))  # of Student's t; the quantile of 1 - p is less exact


def alarm(proxy: Tensor, judge: Tensor, peak: Peak | None, evaluations: int) -> bool:
    """Whether, since a judge's peak, the proxy has surely risen and the judge has surely fallen.

    Args:
        proxy: the score that is trained on, of each prompt. (n,)
        judge: the judge's. (n,)
        peak: of the evaluations before; None where there was none.
        evaluations: how many the whole training makes.
    """
    if peak is None:
        return False
    rise, fall = proxy - torch.tensor(peak.proxy).to(proxy), torch.tensor(peak.judge).to(judge) - judge
    c = threshold(evaluations, len(proxy))
    return all(change.mean().item() > c * standard_error(change) for change in (rise, fall))


def alarms(
    proxy: Tensor, judges: Mapping[str, Tensor], peaks: Mapping[str, Peak], evaluations: int
) -> dict[str, float]:
    """Each judge's ``alarm`` as a metric, ``overoptimised/<name>``: 1.0 where it is on, else 0.0."""
    return {
        f"{ALARM}{name}": float(alarm(proxy, judge, peaks.get(name), evaluations)) for name, judge in judges.items()
    }


def warn_if_new(metrics: Mapping[str, float], before: Sequence[Mapping[str, float]], peaks: Mapping[str, Peak]) -> None:
    """Say of each judge whose alarm has just gone on what has happened since its peak."""
    last = before[-1] if before else {}
    for name, peak in peaks.items():
        if metrics[ALARM + name] and not last.get(ALARM + name):
            log.warning(
                "over-optimised: since update %d the score rose from %.4g to %.4g, but judge %r fell from %.4g to %.4g",
                peak.update,
                _mean(peak.proxy),
                metrics["score"],
                name,
                _mean(peak.judge),
                metrics[f"judge/{name}"],
            )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def followed(peaks: Mapping[str, Peak], update: int, proxy: Tensor, judges: Mapping[str, Tensor]) -> dict[str, Peak]:
    """The peaks of all judges with an evaluation, whose scores these are, among them. (n,) each."""
    found = dict(peaks)
    for name, scores in judges.items():
        if name not in found or scores.mean() > torch.tensor(found[name].judge).to(scores).mean():
            found[name] = Peak(update, proxy.tolist(), scores.tolist())
    return found
