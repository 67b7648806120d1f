"""The gate: numbers by hand, a refusal for each condition, and how often it is wrong when nothing differs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rlhf.champions.gate import Figures, Pair, Verdict, judged
from rlhf.config.promotion import Promotion

UP = np.tile([0.9, 1.1], 20)  # 40 differences with mean 1
ZERO = np.zeros(40)
GOOD = Figures("the champion", Pair(UP, ZERO), Pair(ZERO + 0.5, ZERO + 0.5), kl=3.0, overoptimised=0.0)


def verdict(figures: Figures = GOOD, **rules: Any) -> Verdict:
    return judged(figures, Promotion(**rules))


def failed(found: Verdict) -> list[str]:
    return [condition.name for condition in found.conditions if not condition.passed]


def test_one_that_fulfils_all_is_promoted_with_its_numbers() -> None:
    found = verdict()
    assert found.promote
    assert [condition.name for condition in found.conditions] == ["prompts", "judge", "kl", "rouge", "overoptimised"]
    numbers = found.conditions[1].numbers
    assert numbers["difference"] == pytest.approx(1.0)
    # By hand: s = 0.1 sqrt(40 / 39); Student's t with 39 degrees is 1.685; drawing subsets comes as near as 0.002.
    assert numbers["low"] == pytest.approx(1 - 1.685 * 0.1 * math.sqrt(40 / 39) / math.sqrt(40), abs=2e-3)
    assert found.reasons[1].startswith("held_out: 1 of the candidate, 0 of the champion; the difference 1 is surely")
    assert found.notes == ()


@pytest.mark.parametrize(
    ("figures", "rules", "condition", "says"),
    [
        (GOOD, {"min_prompts": 41}, "prompts", "40 held-out prompts were judged, and it takes 41"),
        (GOOD, {"margin": 0.98}, "judge", "the difference 1 is not surely over the margin 0.98 (above 0.97"),
        (GOOD._replace(scores=Pair(ZERO, UP)), {}, "judge", "0 of the candidate, 1 of the champion"),
        (GOOD._replace(scores=Pair(UP, UP)), {}, "judge", "the difference 0 is not surely over the margin 0"),
        (GOOD._replace(scores="there is no judge"), {}, "judge", "there is no judge"),
        (GOOD, {"kl_budget": 2.5}, "kl", "3 nats per response, over the budget of 2.5"),
        (GOOD._replace(kl=math.nan), {}, "kl", "was not measured"),
        (
            GOOD._replace(rouge=Pair(ZERO + 0.44, ZERO + 0.5)),
            {},
            "rouge",
            "0.440 of the candidate, 0.500 of the champion; the difference -0.060 is under the -0.05 that is allowed",
        ),
        (GOOD._replace(overoptimised=1.0), {}, "overoptimised", "the reward rose while a judge's score fell"),
    ],
)
def test_a_refusal_names_its_condition_and_its_numbers(
    figures: Figures, rules: dict[str, Any], condition: str, says: str
) -> None:
    found = verdict(figures, **rules)
    assert not found.promote
    assert failed(found) == [condition]
    assert len(found.reasons) == 1
    assert says in found.reasons[0]


def test_all_that_fail_are_named() -> None:
    figures = Figures("the champion", Pair(ZERO, UP), Pair(ZERO, UP), kl=99.0, overoptimised=1.0)
    assert failed(verdict(figures, min_prompts=99)) == ["prompts", "judge", "kl", "rouge", "overoptimised"]


@pytest.mark.parametrize(
    ("figures", "rules", "note"),
    [
        (GOOD._replace(rouge=None), {}, "there are no references, so that text metrics are left out"),
        (GOOD._replace(rouge=Pair(ZERO * np.nan, ZERO)), {}, "there are no references"),
        (GOOD._replace(overoptimised=math.nan), {}, "no judge watched the training"),
        (GOOD._replace(kl=99.0), {"kl_budget": None}, "any KL is allowed"),
        (GOOD._replace(rouge=Pair(ZERO, UP)), {"rouge_floor": None}, "ROUGE-L may be anything"),
        (GOOD._replace(overoptimised=1.0), {"refuse_overoptimised": False}, "over-optimisation is not looked at"),
    ],
)
def test_what_is_left_out_is_said(figures: Figures, rules: dict[str, Any], note: str) -> None:
    found = verdict(figures, **rules)
    assert found.promote
    assert [note in line for line in found.reasons[-1:]] == [True]


def test_the_limits_themselves_are_allowed() -> None:
    figures = GOOD._replace(rouge=Pair(ZERO + 0.25, ZERO + 0.5))
    assert verdict(figures, kl_budget=3.0, rouge_floor=0.25, min_prompts=40).promote


def test_prompts_without_a_score_do_not_count() -> None:
    scores = Pair(np.where(np.arange(40) < 10, np.nan, UP), ZERO)
    assert failed(verdict(GOOD._replace(scores=scores), min_prompts=31)) == ["prompts"]
    assert verdict(GOOD._replace(scores=scores), min_prompts=30).promote
    nothing = verdict(GOOD._replace(scores=Pair(ZERO * np.nan, ZERO)))
    assert failed(nothing) == ["prompts", "judge"]


@pytest.mark.parametrize(
    ("confidence", "tail"), [(0.95, "normal"), (0.9, "ties"), (0.95, "to the right"), (0.9, "to the left")]
)
def test_of_equal_policies_it_promotes_no_more_than_it_says(confidence: float, tail: str) -> None:
    """2,000 contests of two policies with the same mean score: at most 1 - confidence, and three standard errors."""
    generator, times, n = np.random.default_rng(0), 2000, 60
    base = generator.normal(size=(times, n))
    noise = {
        "normal": generator.normal(size=(times, n)),
        "ties": np.where(generator.random((times, n)) < 0.5, 0.0, generator.choice([-1.0, 1.0], (times, n))),
        "to the right": generator.exponential(size=(times, n)) - 1.0,
        "to the left": 1.0 - generator.exponential(size=(times, n)),
    }[tail]
    promoted = sum(
        verdict(GOOD._replace(scores=Pair(row + differences, row)), confidence=confidence).promote
        for row, differences in zip(base, noise, strict=True)
    )
    stated = 1 - confidence
    assert promoted / times <= stated + 3 * math.sqrt(stated * confidence / times)
    assert promoted > 0  # it is not that nothing ever passes


def test_a_clear_gain_is_seen() -> None:
    generator = np.random.default_rng(0)
    gains = generator.normal(0.5, 1.0, size=(200, 60))
    assert sum(verdict(GOOD._replace(scores=Pair(row, row * 0))).promote for row in gains) > 190
