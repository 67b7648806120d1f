"""Win rates, raw and at equal length."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize

from rlhf.statistics import intervals
from rlhf.statistics.intervals import length_controlled_win_rate

SURE = {"confidence": 0.95, "resamples": 300, "seed": 0}


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


def test_win_shares() -> None:
    assert intervals.win_shares([1, 2, 3, 5, math.nan], [0, 2, 4, 1, 0]) == (2 / 4, 1 / 4, 1 / 4)
    assert np.isnan(intervals.win_shares([], [])).all()
    shares = intervals.win_shares([1, 2, 3], [1, 1, 1])
    assert shares.wins + shares.ties / 2 == pytest.approx(intervals.win_rate([1, 2, 3], [1, 1, 1], **SURE).value)


def _judged(n: int, at_equal_length: float, by_length: float, longer: float, seed: int) -> tuple[np.ndarray, ...]:
    """Outcomes of a judge who likes long responses, of a policy whose responses are ``longer`` on average."""
    generator = np.random.default_rng(seed)
    difference = generator.normal(longer, 30, n)
    logit = math.log(at_equal_length / (1 - at_equal_length)) + by_length * np.tanh(difference / difference.std())
    return (generator.random(n) < 1 / (1 + np.exp(-logit))).astype(float), difference


def test_a_win_rate_inflated_by_length_is_found_at_equal_length() -> None:
    wins, difference = _judged(20_000, 0.4, 2.5, 25, 0)
    assert wins.mean() > 0.6
    found = length_controlled_win_rate(wins, difference, 0.95, 20, 0)
    assert found.value == pytest.approx(0.4, abs=0.02)
    assert found.n == 20_000


def test_its_interval_covers_the_truth_and_the_raw_one_does_not() -> None:
    rounds = [_judged(200, 0.45, 2.0, 25, seed) for seed in range(150)]
    found = [length_controlled_win_rate(wins, difference, 0.95, 200, 0) for wins, difference in rounds]
    assert 0.89 <= np.mean([one.low <= 0.45 <= one.high for one in found]) <= 0.99
    raw = [intervals.bootstrap_interval(wins, 0.95, 200, 0) for wins, _ in rounds]
    assert np.mean([one.low <= 0.45 <= one.high for one in raw]) < 0.3


def test_where_length_has_no_effect_it_is_the_raw_rate() -> None:
    wins, difference = _judged(5000, 0.7, 0.0, 0, 1)
    assert length_controlled_win_rate(wins, difference, **SURE | {"resamples": 20}).value == pytest.approx(
        wins.mean(), abs=0.005
    )
    paired = np.array([1, 0.5, 0, 1] * 10), np.array([-3.0] * 40)
    mirrored = np.concatenate([paired[0]] * 2), np.concatenate([paired[1], -paired[1]])
    assert length_controlled_win_rate(*mirrored, **SURE).value == pytest.approx(0.625, abs=1e-4)
    same_length = length_controlled_win_rate(paired[0], np.zeros(40), **SURE)
    raw = intervals.bootstrap_interval(paired[0], **SURE)
    assert same_length[:3] == pytest.approx(raw[:3], abs=1e-3)


def test_newton_finds_the_minimum_of_the_loss() -> None:
    wins, difference = np.array([1, 1, 0, 1, 0.5, 0]), np.array([4.0, 1, -2, -3, 0, 2])
    length = np.tanh(difference / difference.std())

    def loss(parameters: np.ndarray) -> float:
        logit = parameters[0] + parameters[1] * length
        return float(np.sum(np.logaddexp(0, logit) - wins * logit) + 0.01 / 2 * parameters @ parameters)

    a = optimize.minimize(loss, np.zeros(2), tol=1e-10).x[0]
    assert length_controlled_win_rate(wins, difference, **SURE).value == pytest.approx(1 / (1 + math.exp(-a)), abs=1e-5)


def test_separable_and_odd_outcomes_stay_finite() -> None:
    difference = np.arange(-10.0, 10)
    apart = length_controlled_win_rate(difference > 0, difference, **SURE)
    assert 0 < apart.low <= apart.value <= apart.high < 1
    always = length_controlled_win_rate(np.ones(20), difference, **SURE)
    assert 0.99 < always.low <= always.value <= 1
    turned = length_controlled_win_rate(np.zeros(20), difference, **SURE)
    assert turned.value == pytest.approx(1 - always.value)
    huge = length_controlled_win_rate([1, 0, 1, 0], [1e9, -1e9, 3, -7], **SURE)
    assert 0 <= huge.low <= huge.value <= huge.high <= 1


def test_what_cannot_be_told_apart_is_nan() -> None:
    assert math.isnan(length_controlled_win_rate([1, 0, 1], [5, 5, 5], **SURE).value)
    assert length_controlled_win_rate([], [], **SURE).n == 0
    assert length_controlled_win_rate([math.nan, 1], [0, math.nan], **SURE).n == 0
    single = length_controlled_win_rate([1], [0], **SURE)
    assert (single.n, math.isnan(single.low)) == (1, True)
    with pytest.raises(ValueError, match="same shape"):
        length_controlled_win_rate([1, 0], [1], **SURE)


def test_a_policy_turned_round_has_the_complement() -> None:
    wins, difference = _judged(300, 0.6, 1.0, 10, 2)
    ahead = length_controlled_win_rate(wins, difference, **SURE)
    behind = length_controlled_win_rate(1 - wins, -difference, **SURE)
    assert ahead.value + behind.value == pytest.approx(1)
    assert (ahead.low, ahead.high) == pytest.approx((1 - behind.high, 1 - behind.low))
