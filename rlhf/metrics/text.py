"""Text metrics against references: ROUGE, BLEU, chrF, METEOR, lengths. Light to import: worker processes do.

Every text metric gives one value per example, which is what a bootstrap needs. An example has one reference text or
several; a metric leaves out references in which it finds nothing: empty ones, for ROUGE those without a-z and 0-9,
so all in another script. Where none remains the value is NaN, and means leave it out. An empty response to a good
reference scores 0.

Shapes: n examples; R resamples (see ``rlhf.statistics.intervals``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, TypeVar

import numpy as np
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import meteor_score
from numpy.typing import ArrayLike, NDArray
from rouge_score.tokenize import tokenize
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.helpers import extract_all_char_ngrams

from rlhf.metrics.subsequence import lcs_length, union_lcs
from rlhf.statistics.intervals import Statistic

Found = TypeVar("Found")
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
References = Sequence[str | Sequence[str]]
"""For each example a reference text, or a list of them, which may be empty."""

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_PORTER = PorterStemmer()
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_TOKEN = re.compile(r"\w+|[^\w\s]")


# --- ROUGE ----------------------------------------------------------------------------------------------------------


def rouge(predictions: Sequence[str], references: References) -> dict[str, Floats]:
    """ROUGE-1, -2, -L and -Lsum F-measures in [0, 1] with Porter stemming (Lin 2004), each (n,).

    The numbers of `rouge_score` in less time: its tokens, and subsequences by bits instead of tables. Of several
    references, each metric takes the one with the best F-measure, as `rouge_score`'s ``score_multi``. Lsum wants
    sentences on lines; text is broken after ``.``, ``!`` or ``?`` and white space, and at line ends.
    """
    rows = np.full((len(predictions), len(ROUGE)), np.nan)
    for row, (prediction, known) in enumerate(_examples(predictions, references, _rouge_sentences)):
        if known:
            found = _rouge_sentences(prediction)
            rows[row] = np.max([_rouge(found, wanted) for wanted in known], axis=0)
    return {name: rows[:, column] for column, name in enumerate(ROUGE)}


def _rouge(found: list[list[str]], wanted: list[list[str]]) -> list[float]:
    """F-measures of the sentences of a prediction and of a reference, in the order of ``ROUGE``."""
    prediction, reference = (list(chain.from_iterable(sentences)) for sentences in (found, wanted))
    n, m = len(prediction), len(reference)
    pairs = [Counter(pairwise(tokens)) for tokens in (prediction, reference)]
    return [
        _f1((Counter(prediction) & Counter(reference)).total(), n, m),
        _f1((pairs[0] & pairs[1]).total(), n - 1, m - 1),
        _f1(lcs_length(reference, prediction), n, m),
        _f1(_summary_hits(found, wanted), n, m),
    ]


def _summary_hits(found: list[list[str]], wanted: list[list[str]]) -> int:
    """Words of the reference in the union of its sentences' subsequences, none counted more often than it occurs.

    Lin 2004, section 3.2, clipped as ROUGE-1.5.5 does.
    """
    union = Counter(word for sentence in wanted for word in union_lcs(sentence, found))
    return (union & Counter(word for sentence in found for word in sentence)).total()


def _f1(hits: int, found: int, wanted: int) -> float:
    """2 P R / (P + R) with P = hits / found and R = hits / wanted."""
    return 2 * hits / (found + wanted) if hits else 0.0


def _rouge_sentences(text: str) -> list[list[str]]:
    """The stemmed tokens of each sentence that has any."""
    sentences = (tokenize(sentence, _Stemmer) for sentence in _SENTENCE_END.split(text))
    return [tokens for tokens in sentences if tokens]


# --- METEOR ---------------------------------------------------------------------------------------------------------


def meteor(predictions: Sequence[str], references: References) -> Floats:
    """METEOR in [0, 1] with exact and stem matches only, (n,): WordNet is a download, so no synonyms.

    `nltk`'s implementation of Lavie and Agarwal 2007 with its defaults, lower-cased, a token being a run of word
    characters or one punctuation mark; of several references the one that gives most. A perfect match of m words
    scores 1 - 0.5 / m^3: 0.5 for one word.
    """
    scores = np.full(len(predictions), np.nan)
    for row, (prediction, known) in enumerate(_examples(predictions, references, _TOKEN.findall)):
        if known:
            scores[row] = meteor_score(known, _TOKEN.findall(prediction), stemmer=_Stemmer, wordnet=_NoWordNet())
    return scores


# --- BLEU -----------------------------------------------------------------------------------------------------------


def bleu_statistics(predictions: Sequence[str], references: References) -> Counts:
    """What BLEU needs of each example, (n, 10): length, reference length, matches of 1- to 4-grams, 1- to 4-grams.

    `sacrebleu` with the 13a tokenizer; of several references, matches are clipped by the one that has an n-gram most
    often, and the length is the closest (the shorter of two). An example without a reference is a row of zeros, which
    adds nothing.
    """
    rows = np.zeros((len(predictions), 10), dtype=np.int64)
    scorer = BLEU(effective_order=True)
    for row, (prediction, known) in enumerate(_examples(predictions, references, str.rstrip)):
        if known:
            score = scorer.sentence_score(prediction, known)
            rows[row] = [score.sys_len, score.ref_len, *score.counts, *score.totals]
    return rows


def corpus_bleu(statistics: Counts) -> float:
    """BLEU of a corpus in [0, 100] (Papineni 2002), with `sacrebleu`'s default smoothing; NaN without a reference."""
    return bleu_of(statistics.sum(axis=0), effective_order=False)


def sentence_bleu(statistics: Counts) -> Floats:
    """BLEU of each example in [0, 100], (n,), over the n-gram orders that the response is long enough for."""
    return np.array([bleu_of(row, effective_order=True) for row in statistics], dtype=np.float64)


def bleu_statistic(statistics: Counts) -> Statistic:
    """Corpus BLEU as a statistic for ``corpus_bootstrap``, from the (n, 10) of ``bleu_statistics``."""

    def statistic(weights: Counts) -> Floats:
        return np.array([bleu_of(row, effective_order=False) for row in weights @ statistics], dtype=np.float64)

    return statistic


def bleu_of(counts: Counts, effective_order: bool) -> float:
    """BLEU in [0, 100] of the ten counts of ``bleu_statistics``, of one example or summed over many."""
    length, reference_length, *grams = (int(count) for count in counts)
    if reference_length == 0:
        return float("nan")
    score = BLEU.compute_bleu(
        grams[:4], grams[4:], length, reference_length, smooth_method="exp", effective_order=effective_order
    )
    return float(score.score)


# --- chrF -----------------------------------------------------------------------------------------------------------


def chrf_statistics(predictions: Sequence[str], references: References) -> Counts:
    """What chrF needs of each example, (n, 18): for 1 to 6 characters, n-grams of response, reference, and both.

    As `sacrebleu` counts by default: case matters, white space is left out; where the reference is too short for an
    order, the response's n-grams of that order do not count. Of several references the one with the best chrF.
    An example without a reference is a row of zeros.
    """
    rows = np.zeros((len(predictions), 3 * CHRF.CHAR_ORDER), dtype=np.int64)
    for row, (prediction, known) in enumerate(_examples(predictions, references, _character_grams)):
        if known:
            found = _character_grams(prediction)
            counts = np.array([_shared(found, wanted) for wanted in known], dtype=np.int64)
            rows[row] = counts[np.argmax(sentence_chrf(counts))]
    return rows


def sentence_chrf(statistics: Counts) -> Floats:
    """chrF2 in [0, 100] of each row of counts, (n, 18) -> (n,) (Popović 2015, 2016); NaN without a reference.

    F = (1 + b^2) P R / (b^2 P + R) with b = 2; P and R are means over the orders that both texts are long enough for.
    """
    found, wanted, both = np.moveaxis(statistics.reshape(-1, CHRF.CHAR_ORDER, 3), 2, 0).astype(np.float64)
    orders = np.maximum(((found > 0) & (wanted > 0)).sum(axis=1), 1)
    precision = (both / np.maximum(found, 1)).sum(axis=1) / orders
    recall = (both / np.maximum(wanted, 1)).sum(axis=1) / orders
    weight = CHRF.BETA**2
    below = weight * precision + recall
    score = 100 * (1 + weight) * precision * recall / np.where(below > 0, below, 1)
    return np.where(wanted.any(axis=1), score, np.nan)


def corpus_chrf(statistics: Counts) -> float:
    """chrF2 of a corpus in [0, 100], from counts summed over its examples; NaN without a reference."""
    return float(sentence_chrf(statistics.sum(axis=0, keepdims=True))[0])


def chrf_statistic(statistics: Counts) -> Statistic:
    """Corpus chrF as a statistic for ``corpus_bootstrap``, from the (n, 18) of ``chrf_statistics``."""
    return lambda weights: sentence_chrf(weights @ statistics)


def _character_grams(text: str) -> list[Counter[str]]:
    """Counts of the n-grams of each order; an empty list for a text of white space."""
    grams: list[Counter[str]] = extract_all_char_ngrams(text, CHRF.CHAR_ORDER)
    return grams if grams[0] else []


def _shared(found: list[Counter[str]], wanted: list[Counter[str]]) -> list[int]:
    counts: list[int] = []
    for have, want in zip(found or [Counter()] * len(wanted), wanted, strict=True):
        both = sum(min(count, want[gram]) for gram, count in have.items() if gram in want)
        counts += [have.total() if want else 0, want.total(), both]
    return counts


# --- lengths --------------------------------------------------------------------------------------------------------


def word_lengths(texts: Sequence[str]) -> Floats:
    """Number of words of each text, (n,): what white space separates."""
    return np.array([len(text.split()) for text in texts], dtype=np.float64)


def length_error(texts: Sequence[str], targets: ArrayLike) -> Floats:
    """|words - target| of each text, (n,), in words; NaN where there is no target (NaN or None)."""
    return np.abs(word_lengths(texts) - np.asarray(targets, dtype=np.float64))


def length_exact(texts: Sequence[str], targets: ArrayLike) -> Floats:
    """1 where a text has exactly its target number of words, else 0, (n,); NaN where there is no target."""
    error = length_error(texts, targets)
    return np.where(np.isnan(error), np.nan, error == 0)


# --- small helpers --------------------------------------------------------------------------------------------------


def _examples(
    predictions: Sequence[str], references: References, reading: Callable[[str], Found]
) -> Iterator[tuple[str, list[Found]]]:
    """Each prediction with what ``reading`` finds in its references, those left out in which it finds nothing."""
    for prediction, given in zip(predictions, references, strict=True):
        texts = [given] if isinstance(given, str) else given
        yield prediction, [found for text in texts if (found := reading(text))]


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
