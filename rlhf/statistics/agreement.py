"""How far judges agree: annotators with the recorded labels and with each other, a judge with held-out labels.

A verdict says which side of the recorded label an annotator prefers. Agreement by chance is counted over
sides whose order knows nothing of that label: a pair's first side is the response with the smaller hash. Counted
over "chosen" and "rejected" instead, annotators who are mostly right would seem to agree by chance.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rlhf.statistics.intervals import Floats, bootstrap_interval

CONFIDENCE = 0.95  # level of the intervals
RESAMPLES = 1000  # of a bootstrap interval


class Agreement(NamedTuple):
    """How far two raters agree; ``kappa`` is ``None`` where both only ever used one and the same category."""

    pairs: int  # judged by both
    agreement: float | None  # share of them on which they agree
    kappa: float | None
    kappa_low: float | None
    kappa_high: float | None


def annotators_report(pairs: pa.Table, annotators: Sequence[str]) -> dict[str, Any]:
    """What the report says of pairs: lengths of the two sides, and agreement of the annotators.

    ``overall`` has the share of all verdicts that agree with the recorded label, the share of agreement over
    all doubly judged pairs, and the mean of the kappas of all pairs of annotators (Light 1971).
    """
    chosen, rejected = pairs["chosen"].to_pylist(), pairs["rejected"].to_pylist()
    flips = [side_hash(one) > side_hash(other) for one, other in zip(chosen, rejected, strict=True)]
    verdicts = {name: pairs[name].to_pylist() for name in annotators}
    sides = {name: _sides(values, flips) for name, values in verdicts.items()}
    between = {f"{a}, {b}": agreement(sides[a], sides[b]) for a, b in combinations(annotators, 2)}
    labels = {name: _with_label(values) for name, values in verdicts.items()}
    return {
        "pairs": pairs.num_rows,
        "length": _lengths(chosen, rejected),
        "with_label": labels,
        "between": {names: found._asdict() for names, found in between.items()},
        "overall": {
            "label_agreement": _mean([(found["agreement"], found["verdicts"]) for found in labels.values()]),
            "agreement": _mean([(found.agreement, found.pairs) for found in between.values()]),
            "kappa": _mean([(found.kappa, 1) for found in between.values()]),
        },
        "interval": f"{CONFIDENCE:.0%}, asymptotic (Fleiss, Cohen and Everitt 1969)",
    }


def agreement(first: Sequence[int | None], second: Sequence[int | None]) -> Agreement:
    """Raw agreement and Cohen's kappa of two raters over the items that both rated.

    kappa = (p_o - p_e) / (1 - p_e), with p_o the share of agreement and p_e its expectation if the raters
    were independent (Cohen 1960); the interval is kappa +- z * its standard error in large samples (Fleiss,
    Cohen and Everitt 1969).

    Args:
        first: category of each item by one rater, ``None`` where there is none. (N,)
        second: the same by the other rater. (N,)
    """
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    n = len(both)
    if not n:
        return Agreement(0, None, None, None, None)
    categories = sorted({category for pair in both for category in pair})
    joint = {(a, b): both.count((a, b)) / n for a in categories for b in categories}
    rows = {a: sum(joint[a, b] for b in categories) for a in categories}
    columns = {b: sum(joint[a, b] for a in categories) for b in categories}
    observed = sum(joint[a, a] for a in categories)
    expected = sum(rows[a] * columns[a] for a in categories)
    if len(categories) == 1:
        return Agreement(n, observed, None, None, None)
    kappa = (observed - expected) / (1 - expected)
    on = sum(joint[a, a] * (1 - (rows[a] + columns[a]) * (1 - kappa)) ** 2 for a in categories)
    off = sum(
        joint[a, b] * (columns[a] + rows[b]) ** 2 * (1 - kappa) ** 2 for a in categories for b in categories if a != b
    )
    variance = (on + off - (kappa - expected * (1 - kappa)) ** 2) / (n * (1 - expected) ** 2)
    margin = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * math.sqrt(max(variance, 0.0))
    return Agreement(n, observed, kappa, kappa - margin, min(kappa + margin, 1.0))


def side_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _sides(verdicts: Sequence[str | None], flips: Sequence[bool]) -> list[int | None]:
    """The side that each verdict prefers: 0 for the response with the smaller hash, 1 for the other."""
    return [
        None if verdict is None else int((verdict == "rejected") != flip)
        for verdict, flip in zip(verdicts, flips, strict=True)
    ]


def _with_label(verdicts: Sequence[str | None]) -> dict[str, Any]:
    given = [verdict for verdict in verdicts if verdict is not None]
    return {"verdicts": len(given), "agreement": given.count("chosen") / len(given) if given else None}


def _lengths(chosen: Sequence[str], rejected: Sequence[str]) -> Mapping[str, float]:
    """Lengths of the sides in characters: a label that follows length teaches a reward model length."""
    sizes = [(len(one), len(other)) for one, other in zip(chosen, rejected, strict=True)]
    return {
        "chosen_mean": fmean(one for one, _ in sizes),
        "rejected_mean": fmean(other for _, other in sizes),
        "chosen_longer": fmean(one > other for one, other in sizes),
        "equal": fmean(one == other for one, other in sizes),
    }


def _mean(values: Sequence[tuple[float | None, int]]) -> float | None:
    """The weighted mean of the values that are there."""
    there = [(value, weight) for value, weight in values if value is not None]
    return sum(value * weight for value, weight in there) / sum(weight for _, weight in there) if there else None


def with_people(margins: Floats, chosen: Sequence[str], rejected: Sequence[str], seed: int) -> dict[str, Any]:
    """How a judge's verdicts compare with people's on N pairs that it did not learn from.

    Args:
        margins: by how much the judge prefers the side that people chose; 0 is a tie, and counts one half. (N,)

    Returns:
        ``pairs``, ``accuracy`` with its bootstrap interval, ``kappa`` (Cohen 1960) with its interval, and
        ``first_share``: how often the judge prefers the side with the smaller hash, which should be one half.
    """
    right = (np.sign(margins) + 1) / 2
    accuracy = bootstrap_interval(right, CONFIDENCE, RESAMPLES, seed)
    flips = [side_hash(one) > side_hash(other) for one, other in zip(chosen, rejected, strict=True)]
    people = [int(flip) for flip in flips]
    ours = [None if margin == 0 else int((margin < 0) != flip) for margin, flip in zip(margins, flips, strict=True)]
    given = [side for side in ours if side is not None]
    return {
        "pairs": len(right),
        "ties": int((np.asarray(margins) == 0).sum()),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        **{name: value for name, value in agreement(people, ours)._asdict().items() if name.startswith("kappa")},
        "first_share": fmean(side == 0 for side in given) if given else None,
    }
