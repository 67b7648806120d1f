"""How good a reward model is on rows that it was not trained on, in NumPy. Shapes: N pairs, B rated texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf.reward import calibration
from rlhf.statistics.intervals import Floats, bootstrap_interval

RESAMPLES, CONFIDENCE = 1000, 0.95  # of the bootstrap intervals

Report = dict[str, Any]


class Scores(NamedTuple):
    """The scores of each of N preference pairs, (N,) and (N,)."""

    chosen: Floats
    rejected: Floats


def wins(scores: Scores) -> Floats:
    """(N,): 1 where the chosen text scores higher, 1/2 where both score the same, 0 elsewhere."""
    return (np.sign(scores.chosen - scores.rejected) + 1) / 2


def pair_loss(scores: Scores) -> float:
    """The mean of -log sigmoid(chosen - rejected), in nats: ln 2 for a model that knows nothing.

    Without margins and centring, whatever the training had: it is the loss of the probabilities that calibration is
    about, of the same scores as the accuracy.
    """
    return float(np.logaddexp(0.0, scores.rejected - scores.chosen).mean())


def pair_report(
    scores: Scores, lengths: Scores, chosen_first: Sequence[bool], seed: int, probabilities: bool
) -> Report | None:
    """All figures of held-out pairs; None where there are none.

    Args:
        scores: logits of both sides. (N,)
        lengths: of both sides, in tokens. (N,)
        chosen_first: an order of the sides that knows no label, for the calibration. (N,)
        probabilities: whether sigmoid(difference) is what the model was trained to give; if not, as after a
            regression, loss and calibration mean nothing and are left out.
    """
    if not len(scores.chosen):
        return None
    difference = scores.chosen - scores.rejected
    report: Report = {
        "pairs": len(difference),
        "accuracy": bootstrap_interval(wins(scores), CONFIDENCE, RESAMPLES, seed)._asdict(),
        "absolute_score_difference": float(np.abs(difference).mean()),
        "by_length": by_length(scores, lengths, seed),
        "length_correlation": length_correlation(difference, lengths.chosen - lengths.rejected),
        "longer_is_better": float(wins(lengths).mean()),
    }
    if probabilities:
        confidence, right = calibration.first_sides(difference, chosen_first)
        bins = calibration.reliability(confidence, right)
        report["loss"] = pair_loss(scores)
        report["calibration"] = {
            "error": calibration.calibration_error(bins),
            "error_if_calibrated": calibration.error_if_calibrated(confidence, seed),
            "bins": [of._asdict() for of in bins],
        }
    return report


def by_length(scores: Scores, lengths: Scores, seed: int) -> list[Report]:
    """Accuracy where the chosen text is shorter, about equally long, or longer: a model that likes length shows.

    About equal is the third of the pairs with the smallest difference of lengths, and all that differ no more than
    these. Groups without a pair are left out.
    """
    difference = lengths.chosen - lengths.rejected
    equal = np.abs(difference) <= np.quantile(np.abs(difference), 1 / 3, method="higher")
    groups = {"shorter": ~equal & (difference < 0), "about_equal": equal, "longer": ~equal & (difference > 0)}
    won = wins(scores)
    return [
        {
            "chosen": name,
            "tokens_from": int(difference[rows].min()),
            "tokens_to": int(difference[rows].max()),
            **bootstrap_interval(won[rows], CONFIDENCE, RESAMPLES, seed)._asdict(),
        }
        for name, rows in groups.items()
        if rows.any()
    ]


def length_correlation(score: Floats, length: Floats) -> float:
    """The correlation of score difference and length difference over both orders of each pair; NaN without either.

    Both orders, since the sign of a difference is that of the label: with each pair counted as (d, l) and (-d, -l)
    the means are 0, and Pearson's r is sum(d l) / sqrt(sum(d^2) sum(l^2)).
    """
    spread = float(np.sqrt((score**2).sum() * (length**2).sum()))
    return float((score * length).sum()) / spread if spread else np.nan


def rating_report(predicted: Floats, rated: Floats, scale: tuple[float, float] | None) -> Report | None:
    """Figures of held-out ratings (B,); None where there are none.

    Args:
        predicted: logits. (B,)
        rated: what the data says. (B,)
        scale: mean and standard deviation of the training ratings, for a model that was trained on (rating - mean) /
            std: the squared error is then given too, in these units (``loss``: about 1 for a model that knows nothing)
            and in the data's own (``mse``).
    """
    if not len(rated):
        return None
    report: Report = {
        "responses": len(rated),
        "pearson": pearson(predicted, rated),
        "spearman": spearman(predicted, rated),
    }
    if scale is not None:
        mean, std = scale
        loss = float(((predicted - (rated - mean) / std) ** 2).mean())
        report |= {"loss": loss, "mse": loss * std**2}
    return report


def pearson(a: Floats, b: Floats) -> float:
    """Pearson's correlation of (B,) and (B,); NaN where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / spread if spread else np.nan


def spearman(a: Floats, b: Floats) -> float:
    """Spearman's correlation of (B,) and (B,): Pearson's of the ranks, equal values sharing their mean rank."""
    return pearson(_ranks(a), _ranks(b))


def _ranks(values: Floats) -> Floats:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks


def finals(pairs: Report | None, ratings: Report | None) -> dict[str, float]:
    """The figures by the names of their metrics; NaN, as of a correlation with a constant, is left out."""
    found: dict[str, Any] = {}
    if pairs is not None:
        found |= _interval("test_accuracy", pairs["accuracy"])
        found |= {f"test_accuracy_chosen_{row['chosen']}": row["value"] for row in pairs["by_length"]}
        found |= {f"test_{name}": pairs[name] for name in _PLAIN if name in pairs}
        if "calibration" in pairs:
            found["test_ece"] = pairs["calibration"]["error"]
            found["test_ece_if_calibrated"] = pairs["calibration"]["error_if_calibrated"]
    if ratings is not None:
        found |= {f"test_{name}": ratings[name] for name in ("loss", "mse", "pearson", "spearman") if name in ratings}
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


_PLAIN = ("loss", "absolute_score_difference", "length_correlation", "longer_is_better")


def _interval(name: str, estimate: Mapping[str, float]) -> dict[str, float]:
    return {name: estimate["value"], f"{name}_low": estimate["low"], f"{name}_high": estimate["high"]}
