"""Metrics of texts, what they are called, and plots. Nothing here touches the network, and what is imported is light.

May import statistics and errors.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.metrics.diversity import distinct, self_bleu
    from rlhf.metrics.labels import LABELS, label
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
else:
    __getattr__ = lazily(__name__)
