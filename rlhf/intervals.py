"""How sure a figure is: bootstrap confidence intervals over examples, in NumPy. The same seed gives the same interval.

NaN stands for a value that does not exist; it is left out, and an estimate says how many values it stands on.
Shapes: n examples, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[NDArray[np.int64]], Floats]
"""A statistic of a corpus: from how often each example counts, (R, n), to its value in each resample, (R,)."""

_CHUNK = 1 << 22  # most elements of one (R, n) array: bounds the memory of a bootstrap


class Estimate(NamedTuple):
    """A figure with its confidence interval, and the number of examples that it stands on.

    All three are NaN without an example; the bounds are with a single one, which says nothing about spread.
    """

    value: float
    low: float
    high: float
    n: int


def bootstrap_interval(values: ArrayLike, confidence: float, resamples: int, seed: int) -> Estimate:
    """The mean of ``values`` (n,), NaN left out, with its percentile bootstrap interval (Efron 1979)."""
    data = np.asarray(values, dtype=np.float64)
    data = data[~np.isnan(data)]
    n = len(data)
    if n < 2:
        return Estimate(float(data[0]) if n else np.nan, np.nan, np.nan, n)
    means = np.concatenate([data[rows].mean(axis=1) for rows in _resampled_rows(n, resamples, seed)])
    low, high = np.quantile(means, _tails(confidence))
    return Estimate(float(data.mean()), float(low), float(high), n)


def corpus_bootstrap(
    statistic: Statistic, n: int, confidence: float, resamples: int, seed: int, limits: tuple[float, float]
) -> Estimate:
    """A statistic of a whole corpus of n examples, with its bias-shifted percentile bootstrap interval.

    A resample repeats examples and lacks others, so that e.g. distinct-n comes out lower in every resample than in the
    corpus. The percentiles are therefore moved by the bootstrap's estimate of that bias, the mean over resamples minus
    the corpus' own value (Efron and Tibshirani 1993, chapter 10); the result is cut to ``limits``, the
    statistic's range.
    """
    if n == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    value = float(statistic(np.ones((1, n), dtype=np.int64))[0])
    if n < 2 or np.isnan(value):
        return Estimate(value, np.nan, np.nan, n)
    counts = (np.stack([np.bincount(row, minlength=n) for row in rows]) for rows in _resampled_rows(n, resamples, seed))
    values = np.concatenate([statistic(chunk) for chunk in counts])
    low, high = np.clip(np.nanquantile(values, _tails(confidence)) - (np.nanmean(values) - value), *limits)
    return Estimate(value, float(low), float(high), n)


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float, resamples: int, seed: int) -> Estimate:
    """The mean of a - b over the same examples, both (n,); a pair with a NaN is left out."""
    first, second = _paired(a, b)
    return bootstrap_interval(first - second, confidence, resamples, seed)


def win_rate(a: ArrayLike, b: ArrayLike, confidence: float, resamples: int, seed: int) -> Estimate:
    """How often a beats b on the same example, both (n,), in [0, 1]; a tie is half a win, a pair with NaN left out."""
    first, second = _paired(a, b)
    wins = np.where(first == second, 0.5, (first > second).astype(np.float64))
    wins[np.isnan(first) | np.isnan(second)] = np.nan
    return bootstrap_interval(wins, confidence, resamples, seed)


def without_nan(value: Any) -> Any:
    """The same dictionaries, lists and values with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values must have the same shape, not {first.shape} and {second.shape}")
    return first, second


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2


def _resampled_rows(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Row numbers drawn with replacement, in chunks of (up to R, n). The same for every metric with this n and seed."""
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // n)
    for done in range(0, resamples, step):
        yield generator.integers(0, n, size=(min(step, resamples - done), n))
