"""Metrics against published and hand-computed values."""

from __future__ import annotations

import math
import re
from itertools import zip_longest

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from rlhf import metrics

CAT = "the cat sat on the mat"
WORDS = ["a", "b", "the", "cat", "cats.", "Running", "runs!", "sat,", "3", "é", "好"]
TEXT = st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # README of rouge_score: 6 of 8 and 9 words shared, longest common subsequence 5, 2 of 7 and 8 pairs
        (
            "The quick brown dog jumps on the log.",
            "The quick brown fox jumps over the lazy dog",
            {"rouge1": 12 / 17, "rouge2": 4 / 15, "rougeL": 10 / 17, "rougeLsum": 10 / 17},
        ),
        # Lin 2004, section 3.1; the stemmer makes "killed" and "kill" one word
        ("police kill the gunman", "police killed the gunman", {"rouge1": 1, "rouge2": 1, "rougeL": 1}),
        ("the gunman kill police", "police killed the gunman", {"rouge1": 1, "rouge2": 1 / 3, "rougeL": 2 / 4}),
        # Lin 2004, section 3.2: the union of both sentences' subsequences is w1 w2 w3 w5: recall 4/5, precision 4/10
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", {"rougeLsum": 8 / 15}),
        ("the cat", "the cat sat", {"rouge1": 4 / 5, "rouge2": 2 / 3, "rougeL": 4 / 5, "rougeLsum": 4 / 5}),
        ("Running!", "run", {"rouge1": 1, "rouge2": 0, "rougeL": 1}),
        ("a b a", "a a c", {"rouge1": 2 / 3, "rouge2": 0, "rougeL": 2 / 3}),
        # sentences in another order: L sees one of them, Lsum both
        ("One two three. Four five six.", "Four five six. One two three.", {"rougeL": 1 / 2, "rougeLsum": 1}),
    ],
)
def test_rouge(prediction: str, reference: str, expected: dict[str, float]) -> None:
    found = {name: float(value[0]) for name, value in metrics.rouge([prediction], [reference]).items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (CAT, CAT, 100.0),
        ("the cat sat on the", CAT, 100 * math.exp(1 - 6 / 5)),  # every n-gram right, one word short
        # matches 5/7, 3/6, 1/5, 0/4; a zero counts as 1/2 (exponential smoothing)
        ("the cat the cat on the mat", "the cat is on the mat", 100 * (5 / 7 * 3 / 6 * 1 / 5 * 1 / 8) ** (1 / 4)),
        # Papineni 2002, example 2: 2/7 clipped; then 0/6, 0/5, 0/4 smoothed with 1/2, 1/4, 1/8
        (
            "the the the the the the the",
            "the cat is on the mat",
            100 * (2 / 7 * 1 / 12 * 1 / 20 * 1 / 32) ** (1 / 4),
        ),
        ("dogs bark", CAT, 0.0),
        ("the cat", "the cat", 100.0),  # orders that two words do not have are left out
        ("the cat", "the cat sat", 100 * math.exp(1 - 3 / 2)),
    ],
)
def test_sentence_bleu(prediction: str, reference: str, expected: float) -> None:
    statistics = metrics.bleu_statistics([prediction], [reference])
    assert metrics.sentence_bleu(statistics)[0] == pytest.approx(expected)


def test_clipped_counts_of_papineni() -> None:
    statistics = metrics.bleu_statistics(["the the the the the the the"], ["the cat is on the mat"])
    assert statistics.tolist() == [[7, 6, 2, 0, 0, 0, 7, 6, 5, 4]]


def test_corpus_bleu_pools_counts_and_is_no_mean() -> None:
    statistics = metrics.bleu_statistics([CAT, "a b c d e"], [CAT, "a x y z w"])
    # 7/11, 5/9, 4/7, 3/5 of all n-grams match; 11 words for 11
    assert metrics.corpus_bleu(statistics) == pytest.approx(100 * (7 / 11 * 5 / 9 * 4 / 7 * 3 / 5) ** (1 / 4))
    assert metrics.corpus_bleu(statistics) != pytest.approx(metrics.sentence_bleu(statistics).mean(), rel=0.05)


def test_corpus_bleu_is_sacrebleus() -> None:
    import sacrebleu

    predictions = [CAT, "a quick brown fox jumps over it", "", "it rains, again."]
    references = [CAT, "the quick brown fox jumps over the dog", "something", "it rains again in Paris."]
    ours = metrics.corpus_bleu(metrics.bleu_statistics(predictions, references))
    assert ours == pytest.approx(sacrebleu.corpus_bleu(predictions, [references]).score)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # the documentation of nltk
        (
            "It is a guide to action which ensures that the military always obeys the commands of the party",
            "It is a guide to action that ensures that the military will forever heed Party commands",
            0.6944,
        ),
        (CAT, CAT, 1 - 0.5 * (1 / 6) ** 3),  # 6 matches in 1 chunk
        ("on the mat sat the cat", CAT, 0.5),  # 6 matches in 6 chunks
        ("the cat was sat on the mat", CAT, 60 / 61 * (1 - 0.5 * (2 / 6) ** 3)),  # precision 6/7, recall 1; 2 chunks
        ("cat", CAT, 2 / 11 * 0.5),  # precision 1, recall 1/6
        ("the dogs are running", "the dog is runs", 3 / 4 * (1 - 0.5 * (2 / 3) ** 3)),  # dog and run by their stems
        ("dogs bark", CAT, 0.0),
    ],
)
def test_meteor(prediction: str, reference: str, expected: float) -> None:
    assert metrics.meteor([prediction], [reference])[0] == pytest.approx(expected, abs=5e-5)


def test_published_values_with_several_references() -> None:
    """The README of sacrebleu, of rouge_score the test of its score_multi, the documentation of nltk."""
    predictions = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    bleu = metrics.bleu_statistics(predictions, references)
    assert metrics.corpus_bleu(bleu) == pytest.approx(48.530827, abs=5e-7)
    assert bleu.sum(axis=0)[:2].tolist() == [17, 18]
    assert metrics.corpus_chrf(metrics.chrf_statistics(predictions, references)) == pytest.approx(59.73, abs=5e-3)
    fewer = [["", "The dog had bit the man."], *references[1:]]
    assert metrics.corpus_bleu(metrics.bleu_statistics(predictions, fewer)) == pytest.approx(29.44, abs=5e-3)
    rouge = metrics.rouge(["text first"], [["first text", "first something"]])
    assert [rouge[name][0] for name in ("rouge1", "rouge2", "rougeL")] == [1, 0, 0.5]
    guide = "It is a guide to action which ensures that the military always obeys the commands of the party"
    others = [
        "It is the guiding principle which guarantees the military forces always being under the command of the Party",
        "It is a guide to action that ensures that the military will forever heed Party commands",
        "It is the practical guide for the army always to heed the directions of the party",
    ]
    assert metrics.meteor([guide], [others])[0] == pytest.approx(0.6944, abs=5e-5)


def test_of_several_references_the_best_counts_and_bleu_takes_the_closest_length() -> None:
    references = ["the dog sat", CAT, ""]
    for name, values in metrics.text_scores([CAT], [references]).items():
        assert values[0] == metrics.text_scores([CAT], [CAT])[name][0], name
    row = metrics.bleu_statistics(["a b c"], [["a x", "b c d e", "c"]])[0]
    assert row.tolist() == [3, 2, 3, 1, 0, 0, 3, 2, 1, 0]  # of lengths 2 and 4, both one away, the shorter
    each_best = metrics.rouge(["a b c d"], [["a b", "d c b a"]])
    assert (each_best["rouge1"][0], each_best["rouge2"][0]) == (1, pytest.approx(2 / 4))


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # sacrebleu's own tests; its chrF leaves out orders that a text is too short for
        ("a", "a", 100.0),
        ("", "reference", 0.0),
        ("a b c", "abc", 100.0),
        ("aa", "ab", 25.0),  # 1 of 2 characters, 0 of 1 pairs: P and R are 1/4
        ("abcdefg", "hijklmnop", 0.0),
        # precision (3/4 + 2/3 + 1/2 + 0) / 4, recall (3/5 + 2/4 + 1/3 + 0/2) / 4; order 5 is in the reference alone
        ("abcx", "abcde", 100 * 5 * (23 / 48) * (43 / 120) / (4 * 23 / 48 + 43 / 120)),
        ("Ab", "ab", 25.0),  # case matters
    ],
)
def test_sentence_chrf(prediction: str, reference: str, expected: float) -> None:
    assert metrics.sentence_chrf(metrics.chrf_statistics([prediction], [reference]))[0] == pytest.approx(expected)


def test_corpus_chrf_pools_counts() -> None:
    statistics = metrics.chrf_statistics(["a", "b"], ["a", "c"])
    assert metrics.corpus_chrf(statistics) == pytest.approx(50)  # 1 of 2 characters; sacrebleu's own test


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, st.lists(TEXT.filter(str.strip), min_size=1, max_size=3)), min_size=1, max_size=4))
def test_bleu_and_chrf_are_sacrebleus(examples: list[tuple[str, list[str]]]) -> None:
    predictions, references = map(list, zip(*examples, strict=True))
    bleu, chrf = metrics.bleu_statistics(predictions, references), metrics.chrf_statistics(predictions, references)
    sentence = BLEU(effective_order=True)
    for row, (prediction, given_) in enumerate(examples):
        expected = sentence.sentence_score(prediction, given_).score
        assert metrics.sentence_bleu(bleu)[row] == pytest.approx(expected)
        assert metrics.sentence_chrf(chrf)[row] == pytest.approx(CHRF().sentence_score(prediction, given_).score)
    columns = list(zip_longest(*references))  # sacrebleu wants the first reference of each, then the second
    assert metrics.corpus_bleu(bleu) == pytest.approx(BLEU().corpus_score(predictions, columns).score)
    assert metrics.corpus_chrf(chrf) == pytest.approx(CHRF().corpus_score(predictions, columns).score)


@settings(deadline=None)
@given(TEXT, st.lists(TEXT.filter(lambda text: re.search("[a-z0-9]", text) is not None), min_size=1, max_size=3))
def test_rouge_is_rouge_scores(prediction: str, references: list[str]) -> None:
    scorer = RougeScorer(list(metrics.ROUGE), use_stemmer=True)
    lines = [re.sub(r"(?<=[.!?])\s+", "\n", text) for text in (prediction, *references)]
    expected = scorer.score_multi(lines[1:], lines[0])
    for name, values in metrics.rouge([prediction], [references]).items():
        assert values[0] == pytest.approx(expected[name].fmeasure), name


def test_lengths_against_a_target() -> None:
    texts, targets = ["one two", " one  two\n", "", "one", "你好", "one two"], [2, 5, 0, None, 1, 1.5]
    assert metrics.length_error(texts, targets).tolist() == pytest.approx([0, 3, 0, math.nan, 0, 0.5], nan_ok=True)
    assert metrics.length_exact(texts, targets).tolist() == pytest.approx([1, 0, 1, math.nan, 1, 0], nan_ok=True)


ODD = [
    "",
    " ",
    "\n",
    "!",
    "a",
    "x" * 5000,
    "你好 世界",
    "שלום",
    "नमस्ते दुनिया",
    "🦊",
    "\ud83d",
    "<b>",
    "<skipped>",
    "1 2",
    "\x00",
]


@pytest.mark.parametrize("text", ODD)
def test_odd_responses_have_a_number(text: str) -> None:
    for name, values in metrics.text_scores([text], [CAT]).items():
        assert 0 <= values[0] <= 100, name
    assert metrics.word_lengths([text])[0] == len(text.split())


@pytest.mark.parametrize("text", ODD)
def test_odd_references_have_a_number_or_nan(text: str) -> None:
    scores = metrics.score_texts([CAT, text, ""], [text, text, text])
    for name, values in scores.values.items():
        assert values.shape == (3,)
        assert ((values >= 0) & (values <= 100 + 1e-9) | np.isnan(values)).all(), name
    for value in (metrics.corpus_bleu(scores.bleu), metrics.corpus_chrf(scores.chrf)):
        assert math.isnan(value) or 0 <= value <= 100 + 1e-9


def test_texts_of_ten_thousand_words() -> None:
    generator = np.random.default_rng(0)
    words = [f"w{number}" for number in range(500)]
    text, reference = (" ".join(generator.choice(words, 10_000)) for _ in range(2))
    perfect = {**dict.fromkeys(metrics.ROUGE, 1), "sentence_bleu": 100, "sentence_chrf": 100, "meteor": 1}
    for name, values in metrics.text_scores([text, reference], [reference, reference]).items():
        assert values[1] == pytest.approx(perfect[name]), name
        assert 0 < values[0] < 0.99 * perfect[name], name


@pytest.mark.parametrize("references", ["", "  \n ", [], ["", " "]])
def test_without_a_reference_every_metric_is_undefined(references: str | list[str]) -> None:
    scores = metrics.score_texts(["a"], [references])
    assert all(math.isnan(values[0]) for values in scores.values.values())
    assert math.isnan(metrics.corpus_bleu(scores.bleu))
    assert math.isnan(metrics.corpus_chrf(scores.chrf))


def test_rouge_is_undefined_for_a_reference_in_another_script_and_the_others_are_not() -> None:
    values = {name: value[0] for name, value in metrics.text_scores(["你好 世界"], ["你好 世界"]).items()}
    assert all(math.isnan(values[name]) for name in metrics.ROUGE)
    assert (values["sentence_bleu"], values["sentence_chrf"]) == pytest.approx((100, 100))
    assert values["meteor"] == pytest.approx(1 - 0.5 / 8)
