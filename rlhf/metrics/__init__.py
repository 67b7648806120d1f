"""Metrics of texts. Nothing here touches the network, and what is imported here is light.

``text``: against references. ``diversity``: of a corpus by itself. ``parallel``: all of ``text`` at once, over cores.
``evaluate_interface``: the same as metrics of the `evaluate` package, which is slow to load and not imported here.
"""

from __future__ import annotations

from rlhf.metrics.diversity import distinct, self_bleu
from rlhf.metrics.parallel import TextScores, score_texts, text_scores
from rlhf.metrics.text import (
    ROUGE,
    References,
    bleu_statistic,
    bleu_statistics,
    chrf_statistic,
    chrf_statistics,
    corpus_bleu,
    corpus_chrf,
    length_error,
    length_exact,
    meteor,
    rouge,
    sentence_bleu,
    sentence_chrf,
    word_lengths,
)

__all__ = [
    "ROUGE",
    "References",
    "TextScores",
    "bleu_statistic",
    "bleu_statistics",
    "chrf_statistic",
    "chrf_statistics",
    "corpus_bleu",
    "corpus_chrf",
    "distinct",
    "length_error",
    "length_exact",
    "meteor",
    "rouge",
    "score_texts",
    "self_bleu",
    "sentence_bleu",
    "sentence_chrf",
    "text_scores",
    "word_lengths",
]
