"""The metrics of the `evaluate` package are the same numbers, and need no hub."""

from __future__ import annotations

import math
import socket

import numpy as np
import pytest

from rlhf import metrics
from rlhf.metrics import evaluate_interface
from rlhf.metrics.evaluate_interface import text_metrics

CAT = "the cat sat on the mat"
OF_TEXTS = {*metrics.ROUGE, "sentence_bleu", "sentence_chrf", "meteor"}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a metric opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.mark.parametrize(
    "references", [[CAT, "a dog barks", ""], [[CAT], ["a dog barks", "the dog"], []]], ids=["one", "several"]
)
def test_combined(references: list[str] | list[list[str]]) -> None:
    predictions = [CAT, "a dog", ""]
    means = text_metrics().compute(predictions=predictions, references=references)
    rows = text_metrics().compute(predictions=predictions, references=references, per_example=True)
    scores = metrics.score_texts(predictions, references)
    assert set(rows) == OF_TEXTS | {"length_words", "self_bleu"}
    assert set(means) == set(rows) | {"bleu", "chrf", "distinct1", "distinct2"}
    for name, values in rows.items():
        assert means[name] == pytest.approx(np.nanmean(values))
    for name in OF_TEXTS:
        np.testing.assert_array_equal(rows[name], scores.values[name])
    assert means["rougeL"] == pytest.approx((1 + 0.8) / 2)  # the empty reference is left out
    assert means["bleu"] == pytest.approx(metrics.corpus_bleu(scores.bleu))
    assert means["chrf"] == pytest.approx(metrics.corpus_chrf(scores.chrf))
    assert rows["length_words"] == [6, 2, 0]
    assert means["distinct1"] == pytest.approx(7 / 8)


def test_undefined_is_nan() -> None:
    values = text_metrics().compute(predictions=["a"], references=[""])
    assert {name for name, value in values.items() if not math.isnan(value)} == {"length_words", "distinct1"}


def test_one_metric_alone() -> None:
    assert evaluate_interface.Chrf().compute(predictions=["aa"], references=["ab"])["chrf"] == pytest.approx(25)
    assert evaluate_interface.Lengths().compute(predictions=["a b"], references=[[]]) == {"length_words": 2}
