"""Whether a reward model's confidence is right, in NumPy. Shapes: N pairs.

The model says that one side of a pair is preferred with probability sigmoid(score of it - score of the other)
(Bradley and Terry 1952). Which side is asked about is decided without the label: then these probabilities span
0 to 1, and "right" means that the asked side is the chosen one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf.statistics.intervals import Floats, wilson_interval

BINS, DRAWS, CONFIDENCE = 10, 200, 0.95


class Bin(NamedTuple):
    """Pairs of similar confidence."""

    confidence: float  # mean probability that the model gives
    right: float  # share that came true
    low: float  # interval of that share (Wilson 1927)
    high: float
    pairs: int


def first_sides(difference: Floats, chosen_first: Sequence[bool]) -> tuple[Floats, Floats]:
    """The probability of each pair's first side, and 1 where it is the chosen one, 0 elsewhere; both (N,).

    Args:
        difference: score of the chosen side - score of the rejected one. (N,)
        chosen_first: whether the chosen side is the first one. (N,)
    """
    first = np.asarray(chosen_first, dtype=np.float64)
    return np.exp(-np.logaddexp(0.0, -np.where(first, difference, -difference))), first


def reliability(confidence: Floats, right: Floats, bins: int = BINS) -> list[Bin]:
    """At most ``bins`` bins with equally many pairs each, by confidence; what a reliability diagram shows."""
    found = []
    for rows in _equal_mass(confidence, bins):
        share = float(right[rows].mean())
        low, high = wilson_interval(share, len(rows), CONFIDENCE)
        found.append(Bin(float(confidence[rows].mean()), share, low, high, len(rows)))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error: the mean over pairs of |right - confidence| of their bin; NaN without a pair.

    Guo et al. 2017, equation 3, over bins of equal mass (Nguyen and O'Connor 2015) in place of equal width, so that
    no bin stands on a handful of pairs.
    """
    total = sum(of.pairs for of in bins)
    return sum(of.pairs * abs(of.right - of.confidence) for of in bins) / total if total else np.nan


def error_if_calibrated(confidence: Floats, seed: int, bins: int = BINS) -> float:
    """The mean calibration error if these confidences were right: what N pairs show by chance alone.

    Labels are drawn with the probabilities that the model gives (Bröcker and Smith 2007); NaN without a pair.
    """
    groups = _equal_mass(confidence, bins)
    if not groups:
        return np.nan
    generator = np.random.default_rng(seed)
    errors = np.zeros(DRAWS)
    for draw in range(DRAWS):
        excess = (generator.random(len(confidence)) < confidence) - confidence
        errors[draw] = sum(abs(excess[rows].sum()) for rows in groups) / len(confidence)
    return float(errors.mean())


def _equal_mass(confidence: Floats, bins: int) -> list[NDArray[np.int64]]:
    """Row numbers of each bin, none of them empty."""
    if not len(confidence):
        return []
    return np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(confidence)))
