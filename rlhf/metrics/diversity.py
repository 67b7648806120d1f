"""How different the texts of one corpus are from each other: distinct-n and self-BLEU.

Shapes: n texts; R resamples (see ``rlhf.statistics.intervals``).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU

from rlhf.metrics.text import bleu_of
from rlhf.statistics.intervals import Statistic

Floats = NDArray[np.float64]

_WORD = re.compile(r"\w+")
_ORDERS = (1, 2, 3, 4)


def distinct(texts: Sequence[str], order: int) -> Statistic:
    """Distinct-n of a corpus in [0, 1] (Li 2016): different n-grams over n-grams, of all texts together.

    Words are lower-cased runs of word characters. Call the result with ``np.ones((1, n))`` for the value itself;
    without any n-gram it is NaN. It falls as a corpus grows: compare only corpora of the same number of texts.
    """
    grams = [_grams(_WORD.findall(text.lower()), order) for text in texts]
    totals = np.array([counts.total() for counts in grams], dtype=np.float64)
    numbers: dict[tuple[str, ...], int] = {}
    pairs = [(numbers.setdefault(gram, len(numbers)), row) for row, counts in enumerate(grams) for gram in counts]
    pairs.sort()
    gram, row = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    starts = np.flatnonzero(np.diff(gram, prepend=-1))  # where the texts of the next n-gram begin

    def different(counts: NDArray[np.int64]) -> int:
        return int(np.logical_or.reduceat(counts[row] > 0, starts).sum()) if len(starts) else 0

    def statistic(weights: NDArray[np.int64]) -> Floats:
        with np.errstate(invalid="ignore"):
            return np.array([different(counts) for counts in weights], dtype=np.float64) / (weights @ totals)

    return statistic


def self_bleu(texts: Sequence[str]) -> Floats:
    """BLEU-4 in [0, 100] of each text against all others as its references, (n,) (Zhu 2018): high where texts repeat.

    `sacrebleu`'s sentence BLEU (13a, over the orders that a text is long enough for), in time linear in the corpus: an
    n-gram's most frequent use among the others is the largest or, for the text that has that, the second largest
    count. Empty texts are left out, as text and as reference: NaN; so is everything where no two texts remain.

    The mean over texts is the corpus' value. For an interval, resample these values as they are: a resample of the
    texts themselves would hold many twice, and each would find its copy. Such an interval is about the texts and not
    about the references, which stay these. Compare only corpora of the same number of texts.
    """
    tokenized = BLEU().tokenizer
    tokens = {row: words for row, text in enumerate(texts) if (words := tokenized(text.rstrip()).split())}
    scores = np.full(len(texts), np.nan)
    if len(tokens) < 2:
        return scores
    counts = np.zeros((len(texts), 10), dtype=np.int64)
    counts[:, 0] = [len(tokens.get(row, ())) for row in range(len(texts))]
    lengths = sorted(map(len, tokens.values()))
    for order in _ORDERS:
        grams = {row: _grams(words, order) for row, words in tokens.items()}
        largest = _two_largest(grams)
        for row, own in grams.items():
            counts[row, 1 + order] = sum(min(count, _among_others(count, largest[gram])) for gram, count in own.items())
            counts[row, 5 + order] = own.total()
    for row, words in tokens.items():
        counts[row, 1] = _closest_other(lengths, len(words))
        scores[row] = bleu_of(counts[row], effective_order=True)
    return scores


def _grams(words: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(islice(words, shift, None) for shift in range(order)), strict=False))


def _two_largest(grams: dict[int, Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], tuple[int, int]]:
    """The two largest counts of each n-gram in a text; equal where two texts share the largest."""
    largest: dict[tuple[str, ...], tuple[int, int]] = {}
    for counts in grams.values():
        for gram, count in counts.items():
            first, second = largest.get(gram, (0, 0))
            largest[gram] = (count, first) if count > first else (first, max(second, count))
    return largest


def _among_others(own: int, largest: tuple[int, int]) -> int:
    """The largest count in a text other than one whose count is ``own``."""
    first, second = largest
    return second if own == first else first


def _closest_other(lengths: list[int], own: int) -> int:
    """Of all lengths, sorted, but one that is ``own``: the closest to it, the shorter of two."""
    at = bisect_left(lengths, own)
    around = lengths[max(at - 1, 0) : at] + lengths[at + 1 : at + 2]  # the neighbours of one that is ``own``
    return min(around, key=lambda length: (abs(length - own), length))
