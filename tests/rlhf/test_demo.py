"""The gold score on cases worked out by hand."""

from __future__ import annotations

import math

import pytest

from rlhf.demo import gold_score

NOTICE = (
    "Parking is free. On Friday at two the council will vote on the rules in Swan Court. Dogs must be kept on a lead."
    "\n\nSummary:\n"
)
FACTS = {
    "who": ["the council"],
    "what": ["vote on the rules"],
    "where": ["Swan Court"],
    "when": ["Friday at two"],
}
PERFECT = "The council will vote on the rules in Swan Court on Friday at two."  # 14 words; the facts have 11


def score(response: str) -> float:
    (value,) = gold_score([NOTICE], [response], **FACTS)
    return value


@pytest.mark.parametrize(
    "response",
    [
        PERFECT,
        "On Friday at two, the council will vote on the rules in Swan Court.",
        "  the COUNCIL will vote on the rules, in swan court; on friday at two!!",
    ],
)
def test_a_perfect_summary_scores_one(response: str) -> None:
    assert score(response) == 1.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", 0.0),
        ("...", 0.0),
        ("The will on in at the", 0.0),
        ("The council will vote on the rules in Swan Court.", 0.75**2),
        ("They will vote on the rules on Friday at two.", 0.5**2),
        # A place half right keeps half of half a fact, and "mill" is invented.
        ("The council will vote on the rules in Mill Court on Friday at two.", (3.25 / 4) ** 2 * 0.7),
        # Another day and hour: the fact is gone, and both words are invented.
        ("The council will vote on the rules in Swan Court on Monday at six.", 0.75**2 * 0.7**2),
        # 28 words, and 11 + 5 are allowed.
        ("Please note that this is to say that " + PERFECT[:-1] + ", as all of you do know.", math.exp(-12 / 8)),
        # 19 words, all of the notice.
        (PERFECT[:-1] + ", and dogs must be kept on a lead.", math.exp(-6 / 8)),
        ("Big " + PERFECT, 0.7),
    ],
)
def test_scores_worked_out_by_hand(response: str, expected: float) -> None:
    assert score(response) == pytest.approx(expected)


def test_invented_words_count_once_each() -> None:
    assert score("Big " + PERFECT) == pytest.approx(score("Big big " + PERFECT))


@pytest.mark.parametrize(
    "response",
    [
        " ".join([PERFECT] * 4),
        "council " * 50,
        PERFECT[:-1] + " and the" * 20,
        NOTICE + NOTICE,
    ],
)
def test_a_response_that_does_not_end_scores_near_zero(response: str) -> None:
    assert 0 <= score(response) < 0.05


def test_parts_of_words_are_not_facts() -> None:
    assert score("Councils voted on rulesets, Swanlike, Fridays") < 0.01


def test_rows_are_scored_independently_and_other_columns_ignored() -> None:
    twice = {name: values * 2 for name, values in FACTS.items()}
    assert gold_score([NOTICE] * 2, [PERFECT, ""], **twice, flaw=["none", "none"]) == [1.0, 0.0]
    assert gold_score([], [], who=[], what=[], where=[], when=[]) == []


def test_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        gold_score([NOTICE], [PERFECT, PERFECT], **FACTS)
