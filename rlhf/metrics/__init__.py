"""Metrics of texts, what they are called, and plots. Nothing here touches the network, and what is imported is light.

May import statistics and errors.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.metrics.diversity import distinct as distinct, self_bleu as self_bleu
    from rlhf.metrics.labels import LABELS as LABELS, label as label
    from rlhf.metrics.parallel import TextScores as TextScores, score_texts as score_texts, text_scores as text_scores
    from rlhf.metrics.text import (
        ROUGE as ROUGE,
        References as References,
        bleu_statistic as bleu_statistic,
        bleu_statistics as bleu_statistics,
        chrf_statistic as chrf_statistic,
        chrf_statistics as chrf_statistics,
        corpus_bleu as corpus_bleu,
        corpus_chrf as corpus_chrf,
        length_error as length_error,
        length_exact as length_exact,
        meteor as meteor,
        rouge as rouge,
        sentence_bleu as sentence_bleu,
        sentence_chrf as sentence_chrf,
        word_lengths as word_lengths,
    )
else:
    __getattr__ = lazily(__name__)
