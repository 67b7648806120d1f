"""What the evaluation measures by itself, and how a person reads it."""

from __future__ import annotations

from typing import NamedTuple


class Label(NamedTuple):
    """A metric's name, the digits after its point, and what it is."""

    name: str
    digits: int
    about: str


COMPONENT = "reward_"  # begins the name of a reward of PPO, a function, that is no scorer of the configuration
LABELS = {
    "reward": Label("Reward", 3, "Score of the reward model, which PPO was trained on unless configured otherwise."),
    "held_out": Label(
        "Held-out reward", 3, "Score of a second reward model of another seed, which no policy was trained on."
    ),
    "kl": Label(
        "KL to the reference policy", 2, "Nats per response: exact KL over the vocabulary, summed over its tokens."
    ),
    "rouge1": Label("ROUGE-1", 3, "F-measure of words shared with the reference, stemmed; 0 to 1."),
    "rouge2": Label("ROUGE-2", 3, "The same for pairs of words."),
    "rougeL": Label("ROUGE-L", 3, "The same for the longest common subsequence."),
    "rougeLsum": Label("ROUGE-Lsum", 3, "The same by sentences."),
    "bleu": Label("BLEU", 2, "Of the whole corpus, sacrebleu 13a; 0 to 100."),
    "sentence_bleu": Label("Sentence BLEU", 2, "Mean over the responses; 0 to 100."),
    "chrf": Label("chrF", 2, "Character n-grams of the whole corpus, sacrebleu's chrF2; 0 to 100."),
    "sentence_chrf": Label("Sentence chrF", 2, "Mean over the responses; 0 to 100."),
    "meteor": Label("METEOR", 3, "Exact and stem matches only, without WordNet's synonyms; 0 to 1."),
    "length_tokens": Label("Length, tokens", 1, "Tokens of a response, the end-of-sequence token included."),
    "length_words": Label("Length, words", 1, "Words of a response."),
    "length_error": Label("Off the target length, words", 2, "Mean distance of a response from its target."),
    "length_exact": Label("At the target length", 3, "Share of responses with exactly as many words as they should."),
    "eos_rate": Label("Ended by itself", 3, "Share of responses that end within the limit."),
    "distinct1": Label("Distinct-1", 3, "Different words over words, of all responses together; 0 to 1."),
    "distinct2": Label("Distinct-2", 3, "The same for pairs of words."),
    "self_bleu": Label("Self-BLEU", 2, "BLEU of a response against all others: high where they repeat; 0 to 100."),
    "perplexity": Label(
        "Perplexity", 2, "Under the reference policy at temperature 1, over all response tokens: low is likely text."
    ),
}


def label(metric: str) -> Label:
    """The label of a metric; one that is not ours is a function of the configuration."""
    if metric in LABELS:
        return LABELS[metric]
    if metric.startswith(COMPONENT):
        name = metric.removeprefix(COMPONENT).replace("_", " ")
        return Label(f"Reward: {name}", 3, "One of the rewards that PPO was trained on, before its weight.")
    return Label(metric.replace("_", " ").capitalize(), 3, "Scorer of the configuration.")
