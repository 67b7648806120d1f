"""Longest common subsequences by bits against the table, and against rouge_score's choice among several."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st
from rouge_score import rouge_scorer

from rlhf.metrics.subsequence import lcs_length, union_lcs

TOKENS = st.lists(st.sampled_from("abcd"), max_size=40)


def test_by_hand() -> None:
    assert lcs_length("abcbdab", "bdcaba") == 4  # Cormen et al., Introduction to Algorithms, section 15.4: bcba
    assert lcs_length("", "abc") == lcs_length("abc", "") == lcs_length("abc", "xyz") == 0
    assert lcs_length("ab" * 5000, "ba" * 5000) == 9999


def test_union_of_lin_2004() -> None:
    sentences = [["w1", "w2", "w6", "w7", "w8"], ["w1", "w3", "w8", "w9", "w5"]]
    assert union_lcs(["w1", "w2", "w3", "w4", "w5"], sentences) == ["w1", "w2", "w3", "w5"]
    assert union_lcs(["w1"], []) == union_lcs([], sentences) == []


@settings(deadline=None)
@given(TOKENS, TOKENS)
def test_length_is_the_tables(a: list[str], b: list[str]) -> None:
    assert lcs_length(a, b) == rouge_scorer._lcs_table(a, b)[-1][-1]


@settings(deadline=None)
@given(TOKENS, st.lists(TOKENS, max_size=3))
def test_union_is_rouge_scores(reference: list[str], candidates: list[list[str]]) -> None:
    assert union_lcs(reference, candidates) == rouge_scorer._union_lcs(reference, candidates)
