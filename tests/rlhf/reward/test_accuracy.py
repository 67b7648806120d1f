"""Losses and held-out figures of reward models, against equations written as loops and numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from trl import RewardTrainer

from rlhf.metrics import plots
from rlhf.reward import accuracy, calibration, losses
from rlhf.reward.accuracy import Scores
from rlhf.reward.calibration import Bin

Floats = NDArray[np.float64]


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def zeros(n: int) -> Scores:
    return Scores(np.zeros(n), np.zeros(n))


# ----------------------------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("center", [0.0, 0.3])
def test_the_loss_of_pairs_is_the_equation(center: float) -> None:
    chosen, rejected = [2.0, -1.0, 0.5, 0.0], [1.0, 1.5, 0.5, -3.0]
    margin, weight = [0.0, 0.5, 1.0, -1.0], [0.4, 0.3, 0.2, 0.1]
    expected = 0.0
    for c, r, m, w in zip(chosen, rejected, margin, weight, strict=True):
        expected += w * (-math.log(1 / (1 + math.exp(-(c - r - m)))) + center * (c + r) ** 2)
    found = losses.bradley_terry(double(*chosen), double(*rejected), double(*margin), double(*weight), center)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_of_a_pair_is_its_doubt() -> None:
    """d loss / d chosen = -w sigmoid(rejected + margin - chosen); a larger margin asks for more."""
    chosen = double(0.3, 0.3).requires_grad_()
    losses.bradley_terry(chosen, double(0.1, 0.1), double(0.0, 2.0), double(0.5, 0.5)).backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-0.5 / (1 + math.exp(0.2)), -0.5 / (1 + math.exp(0.2 - 2.0))])


@pytest.mark.parametrize("center", [None, 0.3])
@pytest.mark.parametrize("with_margin", [False, True])
def test_the_loss_of_pairs_is_the_one_of_trl(center: float | None, with_margin: bool) -> None:
    logits = torch.randn(10, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    margin = torch.linspace(0, 2, 5, dtype=torch.float64) * with_margin
    trl: Any = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"eval": {name: [] for name in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")}},
        _total_train_tokens=0,
    )
    inputs = {"attention_mask": torch.ones(10, 1)} | ({"margin": margin} if with_margin else {})
    expected = RewardTrainer.compute_loss(trl, lambda **_: SimpleNamespace(logits=logits), inputs)
    chosen, rejected = logits[:5, 0], logits[5:, 0]
    found = losses.bradley_terry(chosen, rejected, margin, torch.full((5,), 0.2, dtype=torch.float64), center or 0.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_loss_of_rankings_is_equation_1_of_instructgpt() -> None:
    """Two rankings, of 4 and of 2 responses: -1/C(K,2) * the sum over pairs of log sigmoid, then the mean over both."""
    rankings = [[1.5, 0.2, -0.3, -2.0], [0.1, 0.4]]  # best response first
    expected, chosen, rejected = 0.0, [], []
    for scores in rankings:
        total = 0.0
        for better, worse in combinations(scores, 2):
            total += math.log(1 / (1 + math.exp(-(better - worse))))
            chosen.append(better)
            rejected.append(worse)
        expected += -total / math.comb(len(scores), 2) / len(rankings)
    weight = losses.ranking_weights([6, 1])
    assert weight == pytest.approx([1 / 12] * 6 + [1 / 2])
    found = losses.bradley_terry(double(*chosen), double(*rejected), torch.zeros(7), double(*weight))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_the_loss_of_ratings_by_hand() -> None:
    assert losses.squared_error(double(1.0, 2.0, -1.0), double(0.0, 2.5, 1.0)).item() == pytest.approx(5.25 / 3)


# ------------------------------------------------------------------------------------------------------ calibration
def test_the_asked_side_is_the_first_one() -> None:
    confidence, right = calibration.first_sides(np.array([1.0, 1.0, -2.0, 1e4, -1e4]), [True, False, False, True, True])
    up, down = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))
    assert confidence == pytest.approx([up, down, 1 / (1 + math.exp(-2)), 1.0, 0.0])
    assert right.tolist() == [1, 0, 0, 1, 1]


def test_calibration_by_hand() -> None:
    """Six pairs in three bins: |0.15 - 0.5|, |0.5 - 0.5| and |0.85 - 1|, a third each."""
    confidence = np.array([0.9, 0.1, 0.6, 0.2, 0.8, 0.4])
    right = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    bins = calibration.reliability(confidence, right, 3)
    assert [of.confidence for of in bins] == pytest.approx([0.15, 0.5, 0.85])
    assert [of.right for of in bins] == [0.5, 0.5, 1.0]
    assert [of.pairs for of in bins] == [2, 2, 2]
    assert calibration.calibration_error(bins) == pytest.approx((0.35 + 0.0 + 0.15) / 3)
    low, high = stats.binomtest(1, 2).proportion_ci(method="wilson")
    assert (bins[0].low, bins[0].high) == pytest.approx((low, high))


def test_bins_are_never_empty_and_weigh_as_many_pairs_as_they_have() -> None:
    found = calibration.reliability(np.linspace(0, 1, 23), np.ones(23))
    assert [of.pairs for of in found] == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    assert len(calibration.reliability(np.full(3, 0.5), np.ones(3))) == 3
    assert calibration.calibration_error([Bin(0.5, 1.0, 0, 1, 3), Bin(0.5, 0.5, 0, 1, 1)]) == pytest.approx(0.375)
    assert calibration.reliability(np.zeros(0), np.zeros(0)) == []
    assert math.isnan(calibration.calibration_error([]))
    assert math.isnan(calibration.error_if_calibrated(np.zeros(0), 0))


def drawn(n: int) -> tuple[Floats, list[bool], Floats]:
    """Differences (chosen - rejected) whose probabilities are true, and which side is first."""
    generator = np.random.default_rng(4)
    first_minus_second = generator.normal(0, 2, n)
    first = generator.random(n) < 1 / (1 + np.exp(-first_minus_second))
    return np.where(first, first_minus_second, -first_minus_second), first.tolist(), first_minus_second


def test_a_perfectly_calibrated_model_and_an_overconfident_one() -> None:
    difference, first, _ = drawn(20_000)

    def error(scale: float) -> tuple[float, float]:
        confidence, right = calibration.first_sides(scale * difference, first)
        bins = calibration.reliability(confidence, right)
        return calibration.calibration_error(bins), calibration.error_if_calibrated(confidence, 0)

    found, by_chance = error(1.0)
    assert found < 2 * by_chance < 0.02
    over, by_chance = error(5.0)
    assert over > 0.1 > 10 * by_chance
    under, _ = error(0.2)
    assert under > 0.1


def test_overconfidence_worked_out() -> None:
    """It says 0.9 of one side or of the other, and is right in three of four: the error of every bin is 0.15."""
    d = math.log(9.0)
    difference, first = np.tile([d, d, d, -d], 50), [True, False, True, False, False, True, False, True] * 25
    report = accuracy.pair_report(Scores(difference, np.zeros(200)), zeros(200), first, 0, True)
    assert report is not None
    assert report["calibration"]["error"] == pytest.approx(0.15)
    assert report["accuracy"]["value"] == 0.75
    assert report["loss"] == pytest.approx(-0.75 * math.log(0.9) - 0.25 * math.log(0.1))


def test_a_loss_of_a_coin_with_a_good_accuracy_is_explained_by_its_calibration() -> None:
    """ln 2 beside 0.75 is possible: scores so close that every probability is 1/2. The error says so: 0.25."""
    first = np.arange(400) % 2 == 0
    tiny = np.tile([1e-6, 1e-6, 1e-6, -1e-6], 100)
    report = accuracy.pair_report(Scores(tiny, np.zeros(400)), zeros(400), first.tolist(), 0, True)
    assert report is not None
    figures = accuracy.finals(report, None)
    assert figures["test_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert figures["test_accuracy"] == 0.75
    assert figures["test_absolute_score_difference"] == pytest.approx(1e-6)
    assert figures["test_ece"] > 3 * figures["test_ece_if_calibrated"]


def test_the_error_of_chance_shrinks_with_the_pairs() -> None:
    """For p = 1/2 and one bin of n pairs, the mean of |share - 1/2| is about sqrt(1 / (2 pi n))."""
    for n in (100, 10_000):
        assert calibration.error_if_calibrated(np.full(n, 0.5), 1, bins=1) == pytest.approx(
            math.sqrt(1 / (2 * math.pi * n)), rel=0.2
        )
    assert calibration.error_if_calibrated(np.full(50, 0.5), 1) == calibration.error_if_calibrated(np.full(50, 0.5), 1)


# ----------------------------------------------------------------------------------------------------------- length
def test_accuracy_by_length_by_hand() -> None:
    lengths = Scores(np.array([9.0, 2, 5, 5, 6, 3]), np.array([2.0, 8, 5, 6, 5, 9]))  # +7 -6 0 -1 +1 -6
    scores = Scores(np.array([1.0, -1, 1, 0, -1, 1]), np.zeros(6))
    rows = accuracy.by_length(scores, lengths, 0)
    assert [row["chosen"] for row in rows] == ["shorter", "about_equal", "longer"]
    assert [row["n"] for row in rows] == [2, 3, 1]
    assert [row["value"] for row in rows] == [0.5, 0.5, 1.0]
    assert [(row["tokens_from"], row["tokens_to"]) for row in rows] == [(-6, -6), (-1, 1), (7, 7)]
    report = accuracy.pair_report(scores, lengths, [True] * 6, 0, probabilities=False)
    assert report is not None
    assert report["longer_is_better"] == pytest.approx(2.5 / 6)
    assert {"loss", "calibration"}.isdisjoint(report)
    figures = accuracy.finals(report, None)
    assert figures["test_accuracy_chosen_longer"] == 1.0
    assert figures["test_accuracy_chosen_shorter"] == figures["test_accuracy_chosen_about_equal"] == 0.5


def test_a_model_that_only_counts_is_seen() -> None:
    generator = np.random.default_rng(0)
    lengths = Scores(*generator.integers(1, 50, (2, 300)).astype(np.float64))
    report = accuracy.pair_report(Scores(lengths.chosen / 9, lengths.rejected / 9), lengths, [True] * 300, 0, True)
    assert report is not None
    figures = accuracy.finals(report, None)
    assert figures["test_length_correlation"] == pytest.approx(1.0)
    assert figures["test_accuracy"] == figures["test_longer_is_better"]
    assert (figures["test_accuracy_chosen_longer"], figures["test_accuracy_chosen_shorter"]) == (1.0, 0.0)


def test_pairs_of_one_length_are_about_equal_and_have_no_correlation() -> None:
    report = accuracy.pair_report(Scores(np.ones(4), np.zeros(4)), zeros(4), [True] * 4, 0, True)
    assert report is not None
    assert [row["chosen"] for row in report["by_length"]] == ["about_equal"]
    assert "test_length_correlation" not in accuracy.finals(report, None)
    assert report["longer_is_better"] == 0.5


def test_the_length_correlation_is_pearsons_over_both_orders() -> None:
    score, length = np.array([1.0, 2.0, -1.0]), np.array([3.0, -1.0, 2.0])
    expected = stats.pearsonr(np.concatenate([score, -score]), np.concatenate([length, -length])).statistic
    assert accuracy.length_correlation(score, length) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------- ratings
def test_figures_of_ratings() -> None:
    predicted, rated = np.array([0.5, -1.0, 0.0, 2.0, 2.0]), np.array([3.0, 1.0, 1.0, 4.0, 5.0])
    report = accuracy.rating_report(predicted, rated, scale=(2.0, 2.0))
    assert report is not None
    assert report["loss"] == pytest.approx(np.mean([0.0, 0.25, 0.25, 1.0, 0.25]))
    assert report["mse"] == pytest.approx(np.mean([0.0, 1.0, 1.0, 4.0, 1.0]))  # of 2 * predicted + 2
    assert report["pearson"] == pytest.approx(stats.pearsonr(predicted, rated).statistic)
    assert report["spearman"] == pytest.approx(stats.spearmanr(predicted, rated).statistic)
    of_pairs = accuracy.rating_report(predicted, rated, scale=None)
    assert of_pairs is not None
    assert set(accuracy.finals(None, of_pairs)) == {"test_pearson", "test_spearman"}
    assert accuracy.rating_report(np.zeros(0), np.zeros(0), None) is None
    constant = accuracy.rating_report(np.zeros(3), np.arange(3.0), None)
    assert accuracy.finals(None, constant) == {}


# ----------------------------------------------------------------------------------------------------------- diagram
def test_the_diagram_is_the_same_for_the_same_bins(tmp_path: Any) -> None:
    difference, first, _ = drawn(500)
    bins = [of._asdict() for of in calibration.reliability(*calibration.first_sides(2 * difference, first))]
    for name in ("one", "other"):
        plots.reliability(tmp_path / f"{name}.png", bins)
    content = (tmp_path / "one.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content == (tmp_path / "other.png").read_bytes()
