"""How sure a figure is: bootstrap confidence intervals over examples, in NumPy. The same seed gives the same interval.

NaN stands for a value that does not exist; it is left out, and an estimate says how many values it stands on.
Shapes: n examples, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]
Statistic = Callable[[NDArray[np.int64]], Floats]
"""A statistic of a corpus: from how often each example counts, (R, n), to its value in each resample, (R,)."""

_CHUNK = 1 << 22  # most elements of one (R, n) array: bounds the memory of a bootstrap
_ROUNDING = 1e-12  # two sums of the same numbers in another order may differ by this, relatively
_RIDGE = 0.01
_NEWTON_STEPS = 50
_CONVERGED = 1e-8


class Estimate(NamedTuple):
    """A figure with its confidence interval, and the number of examples that it stands on.

    All three are NaN without an example; the bounds are with a single one, which says nothing about spread.
    """

    value: float
    low: float
    high: float
    n: int


class PairedTest(NamedTuple):
    """Whether a - b is more than noise: a two-sided p-value, and the mean in standard deviations of the differences."""

    p: float
    effect: float


class CorpusDifference(NamedTuple):
    """The difference of a corpus statistic of two systems, and a two-sided p-value."""

    difference: Estimate
    p: float


class WinShares(NamedTuple):
    """Shares of the examples that a wins, ties and loses against b; together 1, or all NaN without an example."""

    wins: float
    ties: float
    losses: float


class Superiority(NamedTuple):
    """The mean difference of n pairs, its one-sided lower confidence bound, and whether that is above the margin."""

    difference: float
    lower: float
    n: int
    surely: bool


def bootstrap_interval(values: ArrayLike, confidence: float, resamples: int, seed: int) -> Estimate:
    """The mean of ``values`` (n,), NaN left out, with its percentile bootstrap interval (Efron 1979)."""
    data = _known(values)
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
    value, values = _corpus_values(statistic, n, resamples, seed)
    if not len(values):
        return Estimate(value, np.nan, np.nan, n)
    low, high = np.clip(np.quantile(values, _tails(confidence)) - (values.mean() - value), *limits)
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


def paired_corpus_difference(
    statistic_a: Statistic, statistic_b: Statistic, n: int, confidence: float, resamples: int, seed: int
) -> CorpusDifference:
    """A statistic of a corpus for system a less that for b, both on the same n examples and the same resamples.

    The interval is shifted by the bias of the bootstrap, as in ``corpus_bootstrap``. p is the share of resamples in
    which the difference is at least as far from their mean as the corpus' own is from 0, itself counted among them
    (Riezler and Maxwell 2005, bootstrap with shift).
    """
    value, values = _corpus_values(lambda counts: statistic_a(counts) - statistic_b(counts), n, resamples, seed)
    if not len(values):
        return CorpusDifference(Estimate(value, np.nan, np.nan, n), np.nan)
    centre = values.mean()
    low, high = np.quantile(values, _tails(confidence)) - (centre - value)
    extreme = np.count_nonzero(np.abs(values - centre) >= abs(value) - _ROUNDING)
    return CorpusDifference(Estimate(value, float(low), float(high), n), float((1 + extreme) / (1 + len(values))))


def paired_test(a: ArrayLike, b: ArrayLike, resamples: int, seed: int) -> PairedTest:
    """Sign-flip permutation test that a and b (n,) have the same mean, against either side; pairs with NaN left out.

    If both systems are the same, each difference may as well have the other sign. p is the share of sign choices
    whose mean is at least as far from 0: of all of them where there are no more than ``resamples``, else of that many
    drawn ones and the observed one (Phipson and Smyth 2010), so never 0. The effect is d_z, the mean difference over
    the standard deviation of the differences: 0 where a equals b throughout, NaN where they differ by a constant.
    """
    differences = _differences(a, b)
    n = len(differences)
    if n == 0:
        return PairedTest(np.nan, np.nan)
    mean, spread = differences.mean(), differences.std(ddof=1) if n > 1 else 0.0
    effect = mean / spread if spread > 0 else 0.0 if mean == 0 else np.nan
    moving = differences[differences != 0]  # the others have no sign
    observed = abs(moving.sum()) - _ROUNDING * np.abs(moving).sum()
    if 2 ** len(moving) <= resamples:
        signs = 1.0 - 2.0 * (np.arange(2 ** len(moving))[:, None] >> np.arange(len(moving)) & 1)
        return PairedTest(float(np.mean(np.abs(signs @ moving) >= observed)), float(effect))
    generator = np.random.default_rng(seed)
    extreme = sum(
        np.count_nonzero(np.abs((1.0 - 2.0 * generator.integers(0, 2, size=(rows, len(moving)))) @ moving) >= observed)
        for rows in _chunks(resamples, len(moving))
    )
    return PairedTest(float((1 + extreme) / (1 + resamples)), float(effect))


def win_shares(a: ArrayLike, b: ArrayLike) -> WinShares:
    """How often a is above, equal to and below b on the same example, both (n,), as shares; pairs with NaN left out."""
    differences = _differences(a, b)
    if not len(differences):
        return WinShares(np.nan, np.nan, np.nan)
    return WinShares(*(float(np.mean(np.sign(differences) == sign)) for sign in (1, 0, -1)))


def length_controlled_win_rate(
    wins: ArrayLike, length_difference: ArrayLike, confidence: float, resamples: int, seed: int
) -> Estimate:
    """The win rate that would be if both responses were equally long (Dubois et al. 2024), with its interval.

    ``wins`` (n,) are in [0, 1], a tie 0.5; ``length_difference`` (n,) is the length of the response that wins at 1
    less that of the other, in any unit; rows with NaN are left out. Of the logistic regression
    P(win) = sigmoid(a + b tanh(difference / its standard deviation)) it is sigmoid(a), with a percentile bootstrap over
    examples. A ridge of 0.01 (a^2 + b^2) / 2 on the summed log-loss keeps a finite where all win.

    NaN where every difference is the same but not 0: then length and policy cannot be told apart.
    """
    outcome, difference = np.asarray(wins, dtype=np.float64), np.asarray(length_difference, dtype=np.float64)
    _same_shape(outcome, difference)
    known = ~(np.isnan(outcome) | np.isnan(difference))
    outcome, difference = outcome[known], difference[known]
    n, spread = len(outcome), difference.std() if known.any() else 0.0
    if n == 0 or (spread == 0 and difference.any()):
        return Estimate(np.nan, np.nan, np.nan, n)
    length = np.tanh(difference / spread) if spread else difference
    value = float(_rate_at_equal_length(np.ones((1, n)), outcome, length)[0])
    if n < 2:
        return Estimate(value, np.nan, np.nan, n)
    rates = [_rate_at_equal_length(counts, outcome, length) for counts in _resampled_counts(n, resamples, seed)]
    low, high = np.quantile(np.concatenate(rates), _tails(confidence))
    return Estimate(value, float(low), float(high), n)


def superiority(
    a: ArrayLike, b: ArrayLike, margin: float, confidence: float, resamples: int = 2000, seed: int = 0
) -> Superiority:
    """Whether the mean of a - b over the same examples, both (n,), is surely above ``margin``; pairs with NaN left out.

    It is where a one-sided lower bound of the mean at this confidence is above the margin. The bound is the lower one
    of two. One holds exactly where the differences are symmetric about their mean, as those of equal policies are,
    whatever their distribution and however many are ties (``_typical_bound``). The other allows for a few large losses
    among many small wins, to which that is blind (``_skewed_bound``); it needs about 30 examples, and some hundreds
    where the tail of the losses is as long as a lognormal one's.

    The bound is NaN, and nothing sure, where so few pairs can show nothing at this confidence: below 5 at 0.95.
    """
    differences = _differences(a, b)
    n = len(differences)
    if n == 0:
        return Superiority(np.nan, np.nan, 0, False)
    mean = float(differences.mean())
    lower = _typical_bound(differences, confidence, resamples, seed)
    if n < 2 or np.isinf(lower):
        return Superiority(mean, np.nan, n, False)
    lower = min(lower, _skewed_bound(differences, confidence))
    return Superiority(mean, lower, n, lower > margin)


def standard_error(values: ArrayLike) -> float:
    """Standard error of the mean of ``values`` (n,), NaN left out: s / sqrt(n); NaN for fewer than two values."""
    data = _known(values)
    return float(data.std(ddof=1) / np.sqrt(len(data))) if len(data) > 1 else np.nan


def wilson_interval(share: float, n: int, confidence: float) -> tuple[float, float]:
    """The score interval of a share of n (Wilson 1927), which may count halves."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def without_nan(value: Any) -> Any:
    """The same dictionaries, lists and values with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _corpus_values(statistic: Statistic, n: int, resamples: int, seed: int) -> tuple[float, Floats]:
    """A statistic of a corpus, and its values in the resamples that have one; none if the corpus has too little."""
    if n == 0:
        return np.nan, np.empty(0)
    value = float(statistic(np.ones((1, n), dtype=np.int64))[0])
    if n < 2 or np.isnan(value):
        return value, np.empty(0)
    return value, _known(np.concatenate([statistic(counts) for counts in _resampled_counts(n, resamples, seed)]))


def _rate_at_equal_length(counts: NDArray[Any], outcome: Floats, length: Floats) -> Floats:
    """sigmoid(a) of the ridge logistic regression of the outcome on a + b length, (n,), each example ``counts`` times.

    ``counts`` are (R, n), the result is (R,). Newton's method; a step that would move a logit by more than 1 is cut to
    that, so that each one lowers the loss (Bach 2010: the logistic loss is self-concordant in this sense).
    """
    a, b = np.zeros(len(counts)), np.zeros(len(counts))
    for _ in range(_NEWTON_STEPS):
        chance = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * length)))
        pull, weight = counts * (outcome - chance), counts * chance * (1 - chance)
        gradient = pull.sum(axis=1) - _RIDGE * a, pull @ length - _RIDGE * b
        aa, ab, bb = weight.sum(axis=1) + _RIDGE, weight @ length, weight @ length**2 + _RIDGE
        determinant = aa * bb - ab**2
        step_a = (bb * gradient[0] - ab * gradient[1]) / determinant
        step_b = (aa * gradient[1] - ab * gradient[0]) / determinant
        size = np.maximum(np.abs(step_a) + np.abs(step_b), 1)
        a, b = a + step_a / size, b + step_b / size
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < _CONVERGED:
            break
    return np.asarray(1 / (1 + np.exp(-a)), dtype=np.float64)


def _typical_bound(values: Floats, confidence: float, resamples: int, seed: int) -> float:
    """Lower bound of the centre of values that are symmetric about it, from the means of random subsets of them.

    Flipping the signs of a subset of (values - m) moves the mean up just where the subset's mean is below m. So the
    sign-flip test rejects every m below the k-th smallest of R subset means, k = (1 - confidence) (R + 1), and is exact
    with drawn subsets (Hartigan 1969). The empty subset is below all m.
    """
    generator, n = np.random.default_rng(seed), len(values)
    means = []
    for rows in _chunks(resamples, n):
        chosen = generator.integers(0, 2, size=(rows, n)).astype(np.float64)
        size = chosen.sum(axis=1)
        means.append(np.where(size > 0, chosen @ values / np.maximum(size, 1), -np.inf))
    rank = math.floor((1 - confidence) * (resamples + 1) + _ROUNDING)
    return float(np.sort(np.concatenate(means))[rank - 1]) if rank > 0 else -np.inf


def _skewed_bound(values: Floats, confidence: float) -> float:
    """Lower bound of the mean, mean - T s / sqrt(n): T is Student's quantile t, or more for values skewed to the left.

    With a skewness g < 0, T solves Hall's (1992) cubic transformation of the t statistic:
    T = 3 sqrt(n) / g ((1 + g / sqrt(n) (t - g / (6 sqrt(n))))^(1/3) - 1).
    The sample's skewness is enlarged by 1 + 8.5 / n, as it falls short of the distribution's (Hazen 1930), and taken
    no further than to where the cube root is 0. For a skewness to the right T would be smaller than t; it stays t.
    """
    n, mean, spread = len(values), values.mean(), values.std()
    times, root = float(stdtrit(n - 1, confidence)), math.sqrt(n)
    skew = (1 + 8.5 / n) * ((values - mean) ** 3).mean() / spread**3 if spread > 0 else 0.0
    skew = max(skew, 3 * root * (times - math.sqrt(times**2 + 2 / 3)))
    if skew < 0:
        times = 3 * root / skew * (np.cbrt(1 + skew / root * (times - skew / (6 * root))) - 1)
    return float(mean - times * values.std(ddof=1) / root)


def _known(values: ArrayLike) -> Floats:
    data = np.asarray(values, dtype=np.float64)
    return data[~np.isnan(data)]


def _differences(a: ArrayLike, b: ArrayLike) -> Floats:
    first, second = _paired(a, b)
    return _known(first - second)


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    _same_shape(first, second)
    return first, second


def _same_shape(first: Floats, second: Floats) -> None:
    if first.shape != second.shape:
        raise ValueError(f"paired values must have the same shape, not {first.shape} and {second.shape}")


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2


def _resampled_counts(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """How often each example is in each resample, in chunks of (up to R, n)."""
    for rows in _resampled_rows(n, resamples, seed):
        yield np.stack([np.bincount(row, minlength=n) for row in rows])


def _resampled_rows(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Row numbers drawn with replacement, in chunks of (up to R, n). The same for every metric with this n and seed."""
    generator = np.random.default_rng(seed)
    for rows in _chunks(resamples, n):
        yield generator.integers(0, n, size=(rows, n))


def _chunks(resamples: int, n: int) -> Iterator[int]:
    """How many of the resamples to draw at a time."""
    step = max(1, _CHUNK // n)
    for done in range(0, resamples, step):
        yield min(step, resamples - done)
