"""All text metrics of many examples at once, over the cores of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf.metrics import text
from rlhf.metrics.text import References

Floats = NDArray[np.float64]


class TextScores(NamedTuple):
    """Text metrics of n examples against their references.

    ``values``: the per-example metrics by name, each (n,), NaN where undefined. ``bleu`` (n, 10) and ``chrf`` (n, 18):
    the counts that corpus BLEU and corpus chrF are made of.
    """

    values: dict[str, Floats]
    bleu: NDArray[np.int64]
    chrf: NDArray[np.int64]


def score_texts(predictions: Sequence[str], references: References, processes: int | None = None) -> TextScores:
    """All text metrics of ``predictions``, each against its reference or references, over ``processes``."""
    bleu, chrf = text.bleu_statistics(predictions, references), text.chrf_statistics(predictions, references)
    values = text.rouge(predictions, references)
    values["sentence_bleu"] = text.sentence_bleu(bleu)
    values["sentence_chrf"] = text.sentence_chrf(chrf)
    values["meteor"] = text.meteor(predictions, references)
    return TextScores(values, bleu, chrf)


def text_scores(predictions: Sequence[str], references: References, processes: int | None = None) -> dict[str, Floats]:
    """The per-example metrics of ``score_texts``: ROUGE, sentence_bleu, sentence_chrf and meteor, each (n,)."""
    return score_texts(predictions, references, processes).values
