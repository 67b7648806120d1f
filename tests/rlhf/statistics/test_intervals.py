"""Intervals against distributions whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from scipy import stats

from rlhf import metrics
from rlhf.statistics import intervals

CAT = "the cat sat on the mat"
SURE = {"confidence": 0.95, "resamples": 400, "seed": 0}
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def _wins(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    return generator.choice([0.0, 0.5, 1.0], p=[0.15, 0.1, 0.75], size=size)


def _skewed(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    return generator.exponential(2.0, size)


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda generator, size: generator.normal(3.0, 2.0, size), 3.0),
        (_skewed, 2.0),
        (_wins, 0.8),
        (lambda generator, size: generator.choice([-1.0, 0.0, 1.0], p=[0.2, 0.5, 0.3], size=size), 0.1),
    ],
    ids=["normal", "skewed", "wins", "signs"],
)
def test_bootstrap_interval_covers_the_mean_as_often_as_it_says(draw: Draw, truth: float) -> None:
    samples = draw(np.random.default_rng(0), (2000, 200))
    found = np.array([intervals.bootstrap_interval(row, 0.95, 400, seed) for seed, row in enumerate(samples)])
    assert 0.93 <= np.mean((found[:, 1] <= truth) & (truth <= found[:, 2])) <= 0.97


def test_an_interval_of_another_level_covers_as_often_as_that_says() -> None:
    samples = _skewed(np.random.default_rng(0), (600, 200))
    found = np.array([intervals.bootstrap_interval(row, 0.5, 400, seed) for seed, row in enumerate(samples)])
    assert 0.44 <= np.mean((found[:, 1] <= 2) & (found[:, 2] >= 2)) <= 0.56


def test_bootstrap_interval_has_the_width_of_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=1000)
    found = intervals.bootstrap_interval(values, 0.95, 5000, 0)
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(1000)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_corpus_interval_covers_distinct_1_though_every_resample_is_below_it() -> None:
    generator = np.random.default_rng(2)
    chance = 1 / np.arange(1, 301)
    words = [f"w{i}" for i in range(300)]

    def corpus() -> list[str]:
        drawn = generator.choice(300, size=(60, 10), p=chance / chance.sum())
        return [" ".join(words[i] for i in row) for row in drawn]

    ones = np.ones((1, 60), dtype=np.int64)
    truth = np.mean([float(metrics.distinct(corpus(), 1)(ones)[0]) for _ in range(200)])
    found = [intervals.corpus_bootstrap(metrics.distinct(corpus(), 1), 60, 0.95, 200, 0, (0, 1)) for _ in range(150)]
    assert 0.90 <= np.mean([one.low <= truth <= one.high for one in found]) <= 1.0
    widths = [one.high - one.low for one in found]
    assert np.mean(widths) < 0.1  # not by being endless


def test_corpus_bootstrap_of_bleu_holds_the_value_and_stays_in_range() -> None:
    predictions = [CAT, "the cat", "the dog sat on the mat", "a mat"] * 5
    statistics = metrics.bleu_statistics(predictions, [CAT] * 20)
    found = intervals.corpus_bootstrap(metrics.bleu_statistic(statistics), 20, 0.95, 300, 0, (0, 100))
    assert found.value == pytest.approx(metrics.corpus_bleu(statistics))
    assert 0 <= found.low < found.value < found.high <= 100
    perfect = metrics.bleu_statistic(metrics.bleu_statistics([CAT] * 3, [CAT] * 3))
    assert intervals.corpus_bootstrap(perfect, 3, 0.95, 50, 0, (0, 100))[:3] == pytest.approx((100, 100, 100))


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(0).normal(size=50)
    first = intervals.bootstrap_interval(values, 0.95, 200, 7)
    assert intervals.bootstrap_interval(values, 0.95, 200, 7) == first
    assert intervals.bootstrap_interval(values, 0.95, 200, 8) != first


def test_chunks_of_resamples_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(20.0)
    whole = intervals.bootstrap_interval(values, 0.9, 101, 3)
    monkeypatch.setattr(intervals, "_CHUNK", 200)
    assert intervals.bootstrap_interval(values, 0.9, 101, 3) == whole


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], (math.nan, math.nan, math.nan, 0)),
        ([math.nan], (math.nan, math.nan, math.nan, 0)),
        ([2.0, math.nan], (2.0, math.nan, math.nan, 1)),
        ([2.0, 2.0, math.nan], (2.0, 2.0, 2.0, 2)),
    ],
)
def test_interval_of_few_values(values: list[float], expected: tuple[float, float, float, int]) -> None:
    assert tuple(intervals.bootstrap_interval(values, 0.95, 100, 0)) == pytest.approx(expected, nan_ok=True)


def test_corpus_interval_of_nothing() -> None:
    assert intervals.corpus_bootstrap(metrics.distinct([], 1), 0, 0.95, 10, 0, (0, 1)).n == 0
    one = intervals.corpus_bootstrap(metrics.distinct(["a a"], 1), 1, 0.95, 10, 0, (0, 1))
    assert one.value == 0.5
    assert math.isnan(one.low)
    silent = intervals.corpus_bootstrap(metrics.distinct(["", ""], 1), 2, 0.95, 10, 0, (0, 1))
    assert math.isnan(silent.value)


def test_paired_difference_uses_the_pairs() -> None:
    generator = np.random.default_rng(4)
    hard = generator.normal(0, 10, 200)  # prompts differ far more than policies
    found = intervals.paired_difference(hard + 1 + generator.normal(0, 0.1, 200), hard, 0.95, 500, 0)
    assert found.value == pytest.approx(1, abs=0.05)
    assert found.high - found.low < 0.1
    with pytest.raises(ValueError, match=r"same shape, not \(2,\) and \(3,\)"):
        intervals.paired_difference([1, 2], [1, 2, 3], 0.95, 10, 0)


# --- corpora of two systems -----------------------------------------------------------------------------------------


def _mean_of(values: np.ndarray) -> intervals.Statistic:
    return lambda weights: weights @ values / weights.sum(axis=1)


def test_paired_corpus_difference_of_means_is_the_paired_difference() -> None:
    generator = np.random.default_rng(5)
    a, b = generator.normal(0.1, 1, 150), generator.normal(0, 1, 150)
    found = intervals.paired_corpus_difference(_mean_of(a), _mean_of(b), 150, **SURE)
    plain = intervals.paired_difference(a, b, **SURE)
    assert found.difference.value == pytest.approx(plain.value)
    assert (found.difference.low, found.difference.high) == pytest.approx(plain[1:3], abs=0.02)
    assert found.p == pytest.approx(intervals.paired_test(a, b, 4000, 0).p, abs=0.05)


def test_paired_corpus_difference_of_bleu_knows_the_better_system() -> None:
    references = [CAT, "a dog barks at the moon", "it rains in Paris again", "the mat is red and old"] * 10
    good = metrics.bleu_statistic(metrics.bleu_statistics(references, references))
    poor = [text.replace("the ", "a ") if row % 2 else "so it goes" for row, text in enumerate(references)]
    other = metrics.bleu_statistic(metrics.bleu_statistics(poor, references))
    found = intervals.paired_corpus_difference(good, other, 40, **SURE)
    ones = np.ones((1, 40), dtype=np.int64)
    assert found.difference.value == pytest.approx(100 - other(ones)[0])
    assert 0 < found.difference.low < found.difference.value < found.difference.high
    assert found.p == pytest.approx(1 / 401)
    same = intervals.paired_corpus_difference(good, good, 40, **SURE)
    assert (same.difference[:3], same.p) == ((0, 0, 0), 1)


def test_p_values_without_a_difference_are_as_small_as_they_say() -> None:
    """Of means and of a ratio of sums, which no test of means would do for."""
    generator = np.random.default_rng(6)
    found = []
    for seed in range(400):
        (a, b), (c, d) = generator.exponential(1, (2, 2, 60))
        pair = (
            lambda weights, a=a, c=c: (weights @ a) / (weights @ c),
            lambda weights, b=b, d=d: (weights @ b) / (weights @ d),
        )
        found.append(intervals.paired_corpus_difference(*pair, 60, 0.95, 200, seed).p)
    assert np.mean(np.array(found) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert np.mean(np.array(found) <= 0.5) == pytest.approx(0.5, abs=0.1)


def test_paired_corpus_difference_of_little() -> None:
    nothing = intervals.paired_corpus_difference(_mean_of(np.empty(0)), _mean_of(np.empty(0)), 0, **SURE)
    assert math.isnan(nothing.p)
    assert nothing.difference.n == 0
    one = intervals.paired_corpus_difference(_mean_of(np.ones(1)), _mean_of(np.zeros(1)), 1, **SURE)
    assert one.difference[::3] == (1, 1)
    assert math.isnan(one.difference.low)
    assert math.isnan(one.p)


# --- tests of pairs -------------------------------------------------------------------------------------------------


def test_paired_test_of_few_pairs_is_exact() -> None:
    a, b = np.array([1.0, 2.5, 3.0, 0.5, 2.0]), np.array([0.0, 2.0, 3.5, 0.5, 1.0])  # 1, 0.5, -0.5, 0, 1
    sums = [abs(np.dot(signs, [1, 0.5, 0.5, 1])) for signs in product([1, -1], repeat=4)]
    found = intervals.paired_test(a, b, 1000, 0)
    assert found.p == np.mean(np.array(sums) >= 2)
    assert found.effect == pytest.approx(0.4 / np.std([1, 0.5, -0.5, 0, 1], ddof=1))
    assert intervals.paired_test(b, a, 1000, 0) == (found.p, -found.effect)


def test_paired_test_of_many_pairs_is_close_to_students() -> None:
    generator = np.random.default_rng(7)
    a, b = generator.normal(0.2, 1, 100), generator.normal(0, 1, 100)
    found = intervals.paired_test(a, b, 5000, 0)
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.02)
    assert intervals.paired_test(a, b, 5000, 0) == found
    assert intervals.paired_test(a + 5, b, 99, 0).p == 1 / 100  # never 0


def test_paired_test_says_little_of_what_is_not_there() -> None:
    generator = np.random.default_rng(8)
    drawn = generator.choice([-1.0, 0.0, 1.0], size=(1000, 40))
    p = np.array([intervals.paired_test(row, np.zeros(40), 199, seed).p for seed, row in enumerate(drawn)])
    assert np.mean(p <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_paired_test_of_odd_pairs() -> None:
    assert intervals.paired_test([1, 2, math.nan], [1, 2, 3], 100, 0) == (1, 0)
    assert np.isnan(intervals.paired_test([math.nan], [1], 100, 0)).all()
    constant = intervals.paired_test([1.0] * 8, [0.0] * 8, 1000, 0)
    assert constant.p == 2 / 2**8
    assert math.isnan(constant.effect)


def test_standard_error() -> None:
    assert intervals.standard_error([1, 2, 3, 4, math.nan]) == pytest.approx(math.sqrt(5 / 3 / 4))
    assert intervals.standard_error([2, 2]) == 0
    assert math.isnan(intervals.standard_error([1]))
    assert math.isnan(intervals.standard_error([]))


# --- superiority ----------------------------------------------------------------------------------------------------

NULLS: dict[str, Draw] = {
    "normal": lambda generator, size: generator.normal(0, 1, size),
    "skewed to the right": lambda generator, size: generator.exponential(1, size) - 1,
    "skewed to the left": lambda generator, size: 1 - generator.exponential(1, size),
    "long tails": lambda generator, size: generator.standard_t(3, size),
    "signs": lambda generator, size: generator.choice([-1.0, 1.0], size=size),
    "mostly ties": lambda generator, size: generator.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=size),
    "nearly all ties": lambda generator, size: generator.choice([-1.0, 0.0, 1.0], p=[0.05, 0.9, 0.05], size=size),
    "rare losses": lambda generator, size: generator.choice([-4.0, 0.0, 1.0], p=[0.1, 0.5, 0.4], size=size),
}


@pytest.mark.parametrize("n", [30, 200])
@pytest.mark.parametrize("kind", NULLS)
def test_without_a_difference_superiority_says_yes_at_most_at_its_rate(kind: str, n: int) -> None:
    drawn = NULLS[kind](np.random.default_rng(9), (2000, n))
    none, confidence = np.zeros(n), 0.95
    rate = np.mean([intervals.superiority(row, none, 0, confidence, 199, i).surely for i, row in enumerate(drawn)])
    assert rate <= 1 - confidence + 3 * math.sqrt(confidence * (1 - confidence) / 2000)


@pytest.mark.parametrize("kind", ["signs", "mostly ties", "nearly all ties", "long tails"])
def test_equal_policies_pass_at_most_at_the_rate_at_any_confidence_and_number(kind: str) -> None:
    for confidence, n in ((0.9, 30), (0.8, 12), (0.5, 50)):
        drawn, none = NULLS[kind](np.random.default_rng(12), (1000, n)), np.zeros(n)
        rate = np.mean([intervals.superiority(row, none, 0, confidence, 199, i).surely for i, row in enumerate(drawn)])
        assert rate <= 1 - confidence + 3 * math.sqrt(confidence * (1 - confidence) / 1000)


@pytest.mark.parametrize("n", [30, 200])
def test_a_margin_is_part_of_the_rate(n: int) -> None:
    drawn, none = np.random.default_rng(10).normal(0.3, 1, (2000, n)), np.zeros(n)
    rate = np.mean([intervals.superiority(row, none, 0.3, 0.95, 199, seed).surely for seed, row in enumerate(drawn)])
    assert 0.03 <= rate <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize(
    "draw",
    [
        lambda generator, size: generator.normal(0.8, 1, size),
        lambda generator, size: generator.choice([-1.0, 1.0], p=[0.1, 0.9], size=size),
        lambda generator, size: generator.choice([-1.0, 1.0], p=[0.01, 0.99], size=size),
        lambda generator, size: 2.5 - generator.exponential(1, size),
    ],
)
def test_superiority_finds_a_large_effect(draw: Draw) -> None:
    drawn = draw(np.random.default_rng(11), (500, 30))
    assert np.mean([intervals.superiority(row, np.zeros(30), 0, 0.95).surely for row in drawn]) >= 0.95


def test_superiority_by_hand() -> None:
    # without skew it is Student's bound: mean 1, s^2 = 10 / 9, t(9, 0.95) = 1.833113
    a, b = [3.0, 1.0] * 5 + [math.nan], [1.0, 1.0] * 5 + [0.0]
    found = intervals.superiority(a, b, 0, 0.95)
    assert found == (1, pytest.approx(1 - 1.833113 * math.sqrt(10 / 9 / 10), abs=1e-6), 10, True)
    assert not intervals.superiority(a, b, 0.5, 0.95).surely
    assert intervals.superiority([1] * 8, [0] * 8, 0.5, 0.95) == (1, 1, 8, True)
    assert not intervals.superiority([1] * 8, [1] * 8, 0, 0.95).surely


def test_superiority_of_too_few_pairs_is_never_sure() -> None:
    few = intervals.superiority([9] * 4, [0] * 4, 0, 0.95)  # by chance all 4 would be wins once in 16 times
    assert (few.difference, few.surely) == (9, False)
    assert math.isnan(few.lower)
    assert intervals.superiority([9] * 6, [0] * 6, 0, 0.95).surely
    assert intervals.superiority([5], [0], 0, 0.95)[::2] == (5, 1)
    assert not intervals.superiority([], [], 0, 0.95).surely
