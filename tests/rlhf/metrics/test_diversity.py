"""distinct-n and self-BLEU: by hand, against sacrebleu, and in a bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sacrebleu.metrics import BLEU

from rlhf import metrics
from rlhf.statistics import intervals

TEXTS = st.lists(st.lists(st.sampled_from("abc.,"), min_size=1, max_size=8).map(" ".join), min_size=2, max_size=6)


@pytest.mark.parametrize(
    ("texts", "order", "expected"),
    [
        (["a b a", "a c"], 1, 3 / 5),
        (["a b a", "a b"], 2, 2 / 3),  # an n-gram does not cross from one text into the next
        (["A a!"], 1, 1 / 2),
        (["a", "b"], 2, math.nan),
        (["", "你好"], 1, 1.0),
        (["a " * 10_000], 1, 1 / 10_000),
    ],
)
def test_distinct(texts: list[str], order: int, expected: float) -> None:
    value = metrics.distinct(texts, order)(np.ones((1, len(texts)), dtype=np.int64))
    assert value.tolist() == pytest.approx([expected], nan_ok=True)


def test_distinct_of_a_resample_equals_distinct_of_its_texts() -> None:
    texts = ["a b c", "a b", "d e f d", ""]
    weights = np.array([[2, 0, 1, 1], [0, 3, 0, 1], [1, 1, 1, 1], [0, 0, 0, 4]])
    for order in (1, 2):
        expected = [
            metrics.distinct([t for t, k in zip(texts, row, strict=True) for _ in range(k)], order)
            for row in weights.tolist()
        ]
        ones = np.ones((1, 4), dtype=np.int64)
        plain = [float(statistic(ones)[0]) for statistic in expected]
        assert metrics.distinct(texts, order)(weights).tolist() == pytest.approx(plain, nan_ok=True)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a b c d", "a b c d"], [100, 100]),  # each finds itself in the other
        (["a b", "c d"], [0, 0]),
        # pairs, like words, are clipped by the text that has most of them: "a" is twice in one, once in the other
        (["a a", "a", "a a a"], [100, 100 * math.exp(1 - 2), 100 * (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3)]),
        (["a b c", "a b"], [100 * (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3), 100 * math.exp(1 - 3 / 2)]),
        (["a b", "", "a b"], [100, math.nan, 100]),  # empty ones are left out
        (["a"], [math.nan]),
        (["a", " "], [math.nan, math.nan]),
        ([], []),
    ],
)
def test_self_bleu(texts: list[str], expected: list[float]) -> None:
    assert metrics.self_bleu(texts).tolist() == pytest.approx(expected, nan_ok=True)


@settings(deadline=None)
@given(TEXTS)
def test_self_bleu_is_sacrebleus_against_all_others(texts: list[str]) -> None:
    scorer = BLEU(effective_order=True)
    expected = [scorer.sentence_score(text, texts[:row] + texts[row + 1 :]).score for row, text in enumerate(texts)]
    assert metrics.self_bleu(texts).tolist() == pytest.approx(expected)


def test_self_bleu_in_a_bootstrap_is_a_mean_of_values_that_stay() -> None:
    texts = ["the cat sat on the mat", "the cat sat on a mat", "dogs bark at night", "it rains", ""]
    values = metrics.self_bleu(texts)
    found = intervals.bootstrap_interval(values, 0.95, 200, 0)
    assert (found.value, found.n) == (pytest.approx(np.nanmean(values)), 4)
    assert found.low < found.value < found.high < 100


def test_self_bleu_of_long_texts() -> None:
    generator = np.random.default_rng(0)
    texts = [" ".join(map(str, generator.integers(0, 50, 10_000))) for _ in range(3)]
    assert ((metrics.self_bleu(texts) > 0) & (metrics.self_bleu(texts) < 100)).all()
