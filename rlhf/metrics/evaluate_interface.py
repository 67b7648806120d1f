"""The text metrics as metrics of the `evaluate` package, without its hub: nothing here touches the network."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

from rlhf.metrics import diversity, text

Floats = NDArray[np.float64]


class _TextMetric(evaluate.Metric):  # type: ignore[misc]
    """What the metrics share: strings in, everything in memory, no hub.

    ``compute(predictions=..., references=...)`` gives floats by name, means without NaN; with ``per_example=True``
    lists of n values. A reference is a text, or all references are lists of texts.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as unused:  # the base class makes a folder even to work in memory
            super().__init__(keep_in_memory=True, cache_dir=unused, seed=0)

    def _info(self) -> evaluate.MetricInfo:
        one = datasets.Value("string")
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="",
            features=[
                datasets.Features({"predictions": one, "references": one}),
                datasets.Features({"predictions": one, "references": datasets.Sequence(one)}),
            ],
        )

    def _compute(self, predictions: list[str], references: list[Any], per_example: bool = False) -> dict[str, Any]:
        values = self._values(predictions, references)
        if per_example:
            return {name: value.tolist() for name, value in values.items()}
        return {name: _mean(value) for name, value in values.items()} | self._of_corpus(predictions, references)

    @abstractmethod
    def _values(self, predictions: list[str], references: list[Any]) -> dict[str, Floats]:
        """One value for each example, (n,), by metric."""

    def _of_corpus(self, predictions: list[str], references: list[Any]) -> dict[str, float]:
        """What is no mean over examples."""
        return {}


class Rouge(_TextMetric):
    """ROUGE-1, -2, -L, -Lsum F-measures in [0, 1], stemmed; see `rlhf.metrics.rouge`."""

    def _values(self, predictions: list[str], references: list[Any]) -> dict[str, Floats]:
        return text.rouge(predictions, references)


class Bleu(_TextMetric):
    """BLEU in [0, 100] of the corpus (``bleu``) and of the sentences (``sentence_bleu``)."""

    def _values(self, predictions: list[str], references: list[Any]) -> dict[str, Floats]:
        return {"sentence_bleu": text.sentence_bleu(text.bleu_statistics(predictions, references))}

    def _of_corpus(self, predictions: list[str], references: list[Any]) -> dict[str, float]:
        return {"bleu": text.corpus_bleu(text.bleu_statistics(predictions, references))}


class Chrf(_TextMetric):
    """chrF2 in [0, 100] of the corpus (``chrf``) and of the sentences (``sentence_chrf``)."""

    def _values(self, predictions: list[str], references: list[Any]) -> dict[str, Floats]:
        return {"sentence_chrf": text.sentence_chrf(text.chrf_statistics(predictions, references))}

    def _of_corpus(self, predictions: list[str], references: list[Any]) -> dict[str, float]:
        return {"chrf": text.corpus_chrf(text.chrf_statistics(predictions, references))}


class Meteor(_TextMetric):
    """METEOR in [0, 1], exact and stem matches only (no WordNet); see `rlhf.metrics.meteor`."""

    def _values(self, predictions: list[str], references: list[Any]) -> dict[str, Floats]:
        return {"meteor": text.meteor(predictions, references)}


class Lengths(_TextMetric):
    """Words of a response (``length_words``), whatever its reference."""

    def _values(self, predictions: list[str], references: list[Any]) -> dict[str, Floats]:
        return {"length_words": text.word_lengths(predictions)}


class Distinct(_TextMetric):
    """Different words (``distinct1``) and pairs (``distinct2``) of all responses, in [0, 1], without references."""

    def _values(self, predictions: list[str], references: list[Any]) -> dict[str, Floats]:
        return {}

    def _of_corpus(self, predictions: list[str], references: list[Any]) -> dict[str, float]:
        whole = np.ones((1, len(predictions)), dtype=np.int64)
        return {f"distinct{order}": float(diversity.distinct(predictions, order)(whole)[0]) for order in (1, 2)}


class SelfBleu(_TextMetric):
    """BLEU in [0, 100] of a response against all others, whatever its reference; see `rlhf.metrics.self_bleu`."""

    def _values(self, predictions: list[str], references: list[Any]) -> dict[str, Floats]:
        return {"self_bleu": diversity.self_bleu(predictions)}


def text_metrics() -> evaluate.CombinedEvaluations:
    """All of these as one `evaluate` metric.

    ``compute(predictions=..., references=...)`` gives a float for each name; with ``per_example=True`` a list of n
    values, NaN where undefined, without the metrics that only a corpus has.
    """
    return evaluate.combine([Rouge(), Bleu(), Chrf(), Meteor(), Lengths(), Distinct(), SelfBleu()])


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
