"""Metrics against published and hand-computed values."""

from __future__ import annotations

import math
import socket

import numpy as np
import pytest

from rlhf import metrics

CAT = "the cat sat on the mat"


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


@pytest.mark.parametrize("text", ["", " ", "\n", "!", "a", "x" * 5000, "你好 世界", "\ud83d", "<b>", "1 2", "\x00"])
def test_odd_responses_have_a_number(text: str) -> None:
    values = {**metrics.rouge([text], [CAT]), "meteor": metrics.meteor([text], [CAT])}
    values["bleu"] = metrics.sentence_bleu(metrics.bleu_statistics([text], [CAT]))
    assert all(0 <= value[0] <= 100 for value in values.values())
    assert metrics.word_lengths([text])[0] == len(text.split())


@pytest.mark.parametrize("text", ["", "  \n "])
def test_an_empty_reference_leaves_every_metric_undefined(text: str) -> None:
    values = metrics.text_metrics().compute(predictions=["a"], references=[text])
    assert all(math.isnan(value) for value in values.values())


def test_rouge_is_undefined_for_a_reference_in_another_script_and_the_others_are_not() -> None:
    values = metrics.text_metrics().compute(predictions=["你好 世界"], references=["你好 世界"])
    assert math.isnan(values["rouge1"])
    assert values["sentence_bleu"] == pytest.approx(100)
    assert values["meteor"] == pytest.approx(1 - 0.5 / 8)


def test_evaluate_metrics_are_the_same_numbers_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("a metric opened a socket")

    monkeypatch.setattr(socket, "socket", no_network)
    predictions, references = [CAT, "a dog", ""], [CAT, "a dog barks", ""]
    combined = metrics.text_metrics()
    means = combined.compute(predictions=predictions, references=references)
    rows = combined.compute(predictions=predictions, references=references, per_example=True)
    assert set(means) == {*metrics.ROUGE, "bleu", "sentence_bleu", "meteor"}
    assert means["rougeL"] == pytest.approx((1 + 0.8) / 2)  # the empty reference is left out
    assert means["bleu"] == pytest.approx(metrics.corpus_bleu(metrics.bleu_statistics(predictions, references)))
    for name, values in rows.items():
        assert len(values) == 3
        assert means[name] == pytest.approx(np.nanmean(values))


@pytest.mark.parametrize(
    ("texts", "order", "expected"),
    [
        (["a b a", "a c"], 1, 3 / 5),
        (["a b a", "a b"], 2, 2 / 3),  # an n-gram does not cross from one text into the next
        (["A a!"], 1, 1 / 2),
        (["a", "b"], 2, math.nan),
        (["", "你好"], 1, 1.0),
    ],
)
def test_distinct(texts: list[str], order: int, expected: float) -> None:
    value = metrics.distinct(texts, order)(np.ones((1, len(texts)), dtype=np.int64))
    assert value.tolist() == pytest.approx([expected], nan_ok=True)


def test_distinct_of_a_resample_equals_distinct_of_its_texts() -> None:
    texts = ["a b c", "a b", "d e f d", ""]
    weights = np.array([[2, 0, 1, 1], [0, 3, 0, 1], [1, 1, 1, 1]])
    for order in (1, 2):
        expected = [
            metrics.distinct([t for t, k in zip(texts, row, strict=True) for _ in range(k)], order)
            for row in weights.tolist()
        ]
        ones = np.ones((1, 4), dtype=np.int64)
        plain = [float(statistic(ones)[0]) for statistic in expected]
        assert metrics.distinct(texts, order)(weights).tolist() == pytest.approx(plain)
