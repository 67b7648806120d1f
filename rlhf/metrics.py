"""Text metrics: ROUGE, BLEU, METEOR, lengths, distinct-n. Nothing here touches the network.

Every text metric gives one value per example, which is what a bootstrap needs. A value is NaN where the metric is
undefined: the reference is empty or has no token that the metric knows (ROUGE knows a-z and 0-9 only, so any
reference in another script). An empty response to a good reference scores 0. Means leave NaN out.

Shapes: n examples; R resamples (see ``rlhf.intervals``).
"""

from __future__ import annotations

import re
import tempfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import datasets
import evaluate
import numpy as np
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize
from sacrebleu.metrics import BLEU

from rlhf.intervals import Statistic

Floats = NDArray[np.float64]

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_PORTER = PorterStemmer()
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_TOKEN = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"\w+")


# --- per-example text metrics ---------------------------------------------------------------------------------------


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Floats]:
    """ROUGE-1, -2, -L and -Lsum F-measures in [0, 1] with Porter stemming (Lin 2004; `rouge_score`), each (n,).

    Lsum wants sentences on lines; text is broken after ``.``, ``!`` or ``?`` and white space, and at line ends.
    """
    scorer = RougeScorer(list(ROUGE), tokenizer=_RougeTokenizer())
    rows = np.full((len(predictions), len(ROUGE)), np.nan)
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        if re.search("[a-z0-9]", reference.lower()):
            scores = scorer.score(_lines(reference), _lines(prediction))
            rows[row] = [scores[name].fmeasure for name in ROUGE]
    return {name: rows[:, column] for column, name in enumerate(ROUGE)}


def meteor(predictions: Sequence[str], references: Sequence[str]) -> Floats:
    """METEOR in [0, 1] with exact and stem matches only, (n,): WordNet is a download, so no synonyms.

    `nltk`'s implementation of Lavie and Agarwal 2007 with its defaults, lower-cased, a token being a run of word
    characters or one punctuation mark. A perfect match of m words scores 1 - 0.5 / m^3: 0.5 for one word.
    """
    scores = np.full(len(predictions), np.nan)
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        if tokens := _TOKEN.findall(reference):
            scores[row] = single_meteor_score(
                tokens, _TOKEN.findall(prediction), stemmer=_Stemmer, wordnet=_NoWordNet()
            )
    return scores


def bleu_statistics(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.int64]:
    """What BLEU needs of each example, (n, 10): length, reference length, matches of 1- to 4-grams, 1- to 4-grams.

    `sacrebleu` with the 13a tokenizer. An example with an empty reference is a row of zeros, which adds nothing.
    """
    rows = np.zeros((len(predictions), 10), dtype=np.int64)
    scorer = BLEU(effective_order=True)
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        if reference.strip():
            score = scorer.sentence_score(prediction, [reference])
            rows[row] = [score.sys_len, score.ref_len, *score.counts, *score.totals]
    return rows


def corpus_bleu(statistics: NDArray[np.int64]) -> float:
    """BLEU of a corpus in [0, 100] (Papineni 2002), with `sacrebleu`'s default smoothing; NaN without a reference."""
    return _bleu(statistics.sum(axis=0), effective_order=False)


def sentence_bleu(statistics: NDArray[np.int64]) -> Floats:
    """BLEU of each example in [0, 100], (n,), over the n-gram orders that the response is long enough for."""
    return np.array([_bleu(row, effective_order=True) for row in statistics], dtype=np.float64)


def word_lengths(texts: Sequence[str]) -> Floats:
    """Number of words of each text, (n,): what white space separates."""
    return np.array([len(text.split()) for text in texts], dtype=np.float64)


def distinct(texts: Sequence[str], order: int) -> Statistic:
    """Distinct-n of a corpus in [0, 1] (Li 2016): different n-grams over n-grams, of all texts together.

    Words are lower-cased runs of word characters. Call the result with ``np.ones((1, n))`` for the value itself;
    without any n-gram it is NaN. It falls as a corpus grows: compare only corpora of the same number of texts.
    """
    grams = [Counter(zip(*(words[shift:] for shift in range(order)), strict=False)) for words in map(_words, texts)]
    totals = np.array([sum(counts.values()) for counts in grams], dtype=np.float64)
    spread = Counter(gram for counts in grams for gram in counts)  # in how many texts each n-gram is
    own = np.array([sum(spread[gram] == 1 for gram in counts) for counts in grams], dtype=np.float64)
    column = {gram: index for index, gram in enumerate(gram for gram, texts_with in spread.items() if texts_with > 1)}
    shared = np.zeros((len(texts), len(column)), dtype=np.float32)
    for row, counts in enumerate(grams):
        shared[row, [column[gram] for gram in counts if gram in column]] = 1

    def statistic(weights: NDArray[np.int64]) -> Floats:
        present = (weights > 0).astype(np.float32)
        different = present @ own + np.count_nonzero(present @ shared, axis=1)
        with np.errstate(invalid="ignore"):
            return np.asarray(different / (weights @ totals), dtype=np.float64)

    return statistic


def bleu_statistic(statistics: NDArray[np.int64]) -> Statistic:
    """Corpus BLEU as a statistic for ``corpus_bootstrap``, from the (n, 10) of ``bleu_statistics``."""

    def statistic(weights: NDArray[np.int64]) -> Floats:
        return np.array([_bleu(row, effective_order=False) for row in weights @ statistics], dtype=np.float64)

    return statistic


# --- the same as `evaluate` metrics ---------------------------------------------------------------------------------


class _TextMetric(evaluate.Metric):  # type: ignore[misc]
    """What the three metrics share: strings in, everything in memory, no hub."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as unused:  # the base class makes a folder even to work in memory
            super().__init__(keep_in_memory=True, cache_dir=unused, seed=0)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self, predictions: list[str], references: list[str], per_example: bool = False
    ) -> dict[str, float | list[float]]:
        values = self._values(predictions, references)
        if per_example:
            return {name: value.tolist() for name, value in values.items()}
        return {name: _mean(value) for name, value in values.items()}

    @abstractmethod
    def _values(self, predictions: list[str], references: list[str]) -> dict[str, Floats]:
        """One value for each pair, (n,), by metric."""


class Rouge(_TextMetric):
    """ROUGE-1, -2, -L, -Lsum F-measures in [0, 1], stemmed; see `rlhf.metrics.rouge`."""

    def _values(self, predictions: list[str], references: list[str]) -> dict[str, Floats]:
        return rouge(predictions, references)


class Bleu(_TextMetric):
    """BLEU in [0, 100] of the corpus (``bleu``) and of the sentences (``sentence_bleu``)."""

    def _compute(
        self, predictions: list[str], references: list[str], per_example: bool = False
    ) -> dict[str, float | list[float]]:
        statistics = bleu_statistics(predictions, references)
        sentences = sentence_bleu(statistics)
        if per_example:  # BLEU of a corpus is no mean over examples
            return {"sentence_bleu": sentences.tolist()}
        return {"bleu": corpus_bleu(statistics), "sentence_bleu": _mean(sentences)}


class Meteor(_TextMetric):
    """METEOR in [0, 1], exact and stem matches only (no WordNet); see `rlhf.metrics.meteor`."""

    def _values(self, predictions: list[str], references: list[str]) -> dict[str, Floats]:
        return {"meteor": meteor(predictions, references)}


def text_metrics() -> evaluate.CombinedEvaluations:
    """ROUGE, BLEU and METEOR as one `evaluate` metric.

    ``compute(predictions=..., references=...)`` gives a float for each name; with ``per_example=True`` a list of n
    values, NaN where undefined.
    """
    return evaluate.combine([Rouge(), Bleu(), Meteor()])


# --- small helpers --------------------------------------------------------------------------------------------------


class _NoWordNet:
    """Stands in for the WordNet reader, which would want a download: no word has a synonym."""

    def synsets(self, word: str) -> list[Any]:
        return []


class _Stemmer:
    """Porter's stemmer with a memory: the texts of a task share most of their words."""

    @staticmethod
    @lru_cache(maxsize=1 << 16)
    def stem(word: str) -> str:
        stem: str = _PORTER.stem(word)
        return stem


class _RougeTokenizer:
    """What `rouge_score` does by default with its stemmer on."""

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = tokenize(text, _Stemmer)
        return tokens


def _lines(text: str) -> str:
    return _SENTENCE_END.sub("\n", text)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _bleu(totals: NDArray[np.int64], effective_order: bool) -> float:
    length, reference_length, *counts = (int(count) for count in totals)
    if reference_length == 0:
        return float("nan")
    score = BLEU.compute_bleu(
        counts[:4], counts[4:], length, reference_length, smooth_method="exp", effective_order=effective_order
    )
    return float(score.score)
