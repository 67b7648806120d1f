"""Intervals against distributions whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf import intervals, metrics

CAT = "the cat sat on the mat"


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    samples = generator.exponential(2.0, size=(300, 80))
    found = [intervals.bootstrap_interval(row, 0.95, 400, seed) for seed, row in enumerate(samples)]
    assert 0.90 <= np.mean([one.low <= 2.0 <= one.high for one in found]) <= 0.99
    half = [intervals.bootstrap_interval(row, 0.5, 400, seed) for seed, row in enumerate(samples)]
    assert 0.42 <= np.mean([one.low <= 2.0 <= one.high for one in half]) <= 0.58


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


def test_win_rate_counts_a_tie_as_half_and_leaves_out_what_is_unknown() -> None:
    found = intervals.win_rate([1, 2, 3, 5, math.nan], [0, 2, 4, 1, 0], 0.95, 500, 0)
    assert found.value == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found.n == 4
    assert 0 <= found.low < found.value < found.high <= 1
    assert intervals.win_rate([1.0, 2.0], [1.0, 2.0], 0.95, 50, 0)[:3] == (0.5, 0.5, 0.5)


def test_win_rate_turned_round_is_its_complement() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.integers(0, 4, 100), generator.integers(0, 4, 100)
    ahead, behind = intervals.win_rate(a, b, 0.9, 300, 0), intervals.win_rate(b, a, 0.9, 300, 0)
    assert ahead.value + behind.value == pytest.approx(1)
    assert ahead.low + behind.high == pytest.approx(1)


def test_paired_difference_uses_the_pairs() -> None:
    generator = np.random.default_rng(4)
    hard = generator.normal(0, 10, 200)  # prompts differ far more than policies
    found = intervals.paired_difference(hard + 1 + generator.normal(0, 0.1, 200), hard, 0.95, 500, 0)
    assert found.value == pytest.approx(1, abs=0.05)
    assert found.high - found.low < 0.1
    with pytest.raises(ValueError, match=r"same shape, not \(2,\) and \(3,\)"):
        intervals.paired_difference([1, 2], [1, 2, 3], 0.95, 10, 0)
