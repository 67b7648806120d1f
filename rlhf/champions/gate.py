"""Whether a candidate takes the champion's place: a pure function of figures and rules.

Shapes: n held-out prompts, the same ones in the same order for both; NaN where a value does not exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rlhf.config.promotion import Promotion
from rlhf.statistics.intervals import Floats, superiority


class Pair(NamedTuple):
    """What the candidate and the champion reached on each prompt, (n,) and (n,)."""

    candidate: Floats
    champion: Floats


class Figures(NamedTuple):
    """What there is to decide by."""

    opponent: str  # what the candidate was compared with, in words
    scores: Pair | str  # by the judge; or why there are none
    rouge: Pair | None  # ROUGE-L; None without references
    kl: float  # of the candidate to its reference policy, nats per response; NaN: not measured
    overoptimised: float  # 1: a judge's alarm was on when its training ended, 0: none was; NaN: nothing watched it


class Condition(NamedTuple):
    """One thing that a candidate must fulfil; ``sentence`` says of what is in ``numbers`` whether it does."""

    name: str
    passed: bool
    sentence: str
    numbers: dict[str, float]


class Verdict(NamedTuple):
    """Whether the candidate takes the champion's place: if it passed all conditions. ``notes``: what was left out."""

    conditions: tuple[Condition, ...]
    notes: tuple[str, ...] = ()

    @property
    def promote(self) -> bool:
        """Whether it does."""
        return all(condition.passed for condition in self.conditions)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why: the conditions that failed, or all of them where none did; then the notes."""
        failed = tuple(condition.sentence for condition in self.conditions if not condition.passed)
        return (failed or tuple(condition.sentence for condition in self.conditions)) + self.notes


def judged(figures: Figures, rules: Promotion) -> Verdict:
    """What the rules say of these figures. All conditions are looked at, also after one has failed."""
    conditions = [*_by_the_judge(figures, rules)]
    notes = []
    for condition, left_out in (_kl(figures, rules), _rouge(figures, rules), _training(figures, rules)):
        conditions += [condition] if condition else []
        notes += [left_out] if left_out else []
    return Verdict(tuple(conditions), tuple(notes))


def _by_the_judge(figures: Figures, rules: Promotion) -> Iterator[Condition]:
    """Whether the candidate is better, and on enough prompts to say so."""
    if isinstance(figures.scores, str):
        yield Condition("judge", False, figures.scores, {})
        return
    candidate, champion = figures.scores
    found = superiority(candidate, champion, rules.margin, rules.confidence)
    enough = found.n >= rules.min_prompts
    yield Condition(
        "prompts",
        enough,
        f"{found.n} held-out prompts were judged, and it takes {rules.min_prompts}",
        {"prompts": found.n, "min_prompts": rules.min_prompts},
    )
    means = [float(np.nanmean(values)) if found.n else math.nan for values in figures.scores]
    surely = "surely" if found.surely else "not surely"
    yield Condition(
        "judge",
        found.surely,
        f"{rules.judge}: {means[0]:.4g} of the candidate, {means[1]:.4g} of {figures.opponent}; the difference "
        f"{found.difference:.4g} is {surely} over the margin {rules.margin:.4g} (above {found.lower:.4g} with "
        f"{100 * rules.confidence:.4g} % confidence)",
        {
            "candidate": means[0],
            "champion": means[1],
            "difference": found.difference,
            "low": found.lower,
            "margin": rules.margin,
        },
    )


Checked = tuple[Condition | None, str]  # or what the notes say instead


def _kl(figures: Figures, rules: Promotion) -> Checked:
    budget, kl = rules.kl_budget, figures.kl
    if budget is None:
        return None, "any KL is allowed (promotion.kl_budget is null)"
    if math.isnan(kl):
        return Condition("kl", False, "the KL to the reference policy was not measured", {"budget": budget}), ""
    within = "within" if kl <= budget else "over"
    sentence = f"KL to the reference policy: {kl:.4g} nats per response, {within} the budget of {budget:.4g}"
    return Condition("kl", kl <= budget, sentence, {"kl": kl, "budget": budget}), ""


def _rouge(figures: Figures, rules: Promotion) -> Checked:
    """Whether the mean of ROUGE-L fell by no more than the floor allows, over prompts where both have one."""
    if rules.rouge_floor is None:
        return None, "ROUGE-L may be anything (promotion.rouge_floor is null)"
    difference = np.empty(0) if figures.rouge is None else figures.rouge.candidate - figures.rouge.champion
    difference = difference[~np.isnan(difference)]
    if figures.rouge is None or not len(difference):
        return None, "there are no references, so that text metrics are left out"
    mean, floor = float(difference.mean()), rules.rouge_floor
    candidate, champion = (float(np.nanmean(values)) for values in figures.rouge)
    passed = mean >= -floor
    sentence = (
        f"ROUGE-L: {candidate:.3f} of the candidate, {champion:.3f} of {figures.opponent}; the difference {mean:+.3f} "
        f"is {'not ' if passed else ''}under the -{floor:.3g} that is allowed"
    )
    numbers = {"candidate": candidate, "champion": champion, "difference": mean, "floor": floor}
    return Condition("rouge", passed, sentence, numbers), ""


def _training(figures: Figures, rules: Promotion) -> Checked:
    alarm = figures.overoptimised
    if not rules.refuse_overoptimised:
        return None, "over-optimisation is not looked at (promotion.refuse_overoptimised is false)"
    if math.isnan(alarm):
        return None, "no judge watched the training for over-optimisation"
    words = "the reward rose while a judge's score fell" if alarm else "no judge's score fell while the reward rose"
    return Condition("overoptimised", not alarm, f"when the training ended, {words}", {"overoptimised": alarm}), ""
