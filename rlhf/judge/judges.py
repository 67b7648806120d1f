"""What can judge two responses: reward functions, a function that compares, or a model that learnt people's labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from rlhf import rewards
from rlhf.errors import RewardError
from rlhf.stages import JUDGE_MODEL
from rlhf.statistics.intervals import Floats

if TYPE_CHECKING:
    from rlhf.context import Context

Columns = Mapping[str, Sequence[Any]]


class Judged(NamedTuple):
    """By how much the first of two responses is preferred, as it is asked in both orders. (N,) each

    ``swapped`` is the answer where the two change places, seen from the same response; None where order cannot matter.
    """

    forward: Floats
    swapped: Floats | None

    @property
    def margins(self) -> Floats:
        """The mean of both orders: above 0 the first response is better."""
        return self.forward if self.swapped is None else (self.forward + self.swapped) / 2

    def position_bias(self) -> dict[str, float]:
        """How often the verdict is the same in both orders, and how often the response shown first is preferred."""
        if self.swapped is None or not len(self.forward):
            return {}
        first = np.concatenate([self.forward > 0, self.swapped < 0])
        decided = np.concatenate([self.forward != 0, self.swapped != 0])
        shown_first = float(first[decided].mean()) if decided.any() else 0.5
        same = float((np.sign(self.forward) == np.sign(self.swapped)).mean())
        return {"consistency": same, "shown_first_share": shown_first}


class Judge(Protocol):
    """Judges responses to prompts. ``columns`` are the other columns of the rows."""

    def compare(
        self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str], columns: Columns
    ) -> Judged:
        """Which of two responses to each prompt is better."""

    def scores(self, prompts: Sequence[str], responses: Sequence[str], columns: Columns) -> Floats | None:
        """A score of each response, (N,); None for a judge that only compares."""


@dataclass(frozen=True)
class ByScore:
    """A judge that scores each response by itself: the order of two does not matter."""

    score: Callable[[Sequence[str], Sequence[str], Columns], Sequence[float]]

    def compare(
        self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str], columns: Columns
    ) -> Judged:
        """By how much the first response scores higher."""
        return Judged(self.scores(prompts, firsts, columns) - self.scores(prompts, seconds, columns), None)

    def scores(self, prompts: Sequence[str], responses: Sequence[str], columns: Columns) -> Floats:
        """The scores. Without a response nothing is asked, as a function need not take an empty batch."""
        if not responses:
            return np.empty(0)
        return np.asarray(self.score(prompts, responses, columns), dtype=np.float64)


@dataclass(frozen=True)
class ByComparison:
    """A function of the user that compares two responses, asked in both orders; ``setting`` is what names it."""

    function: Callable[..., Sequence[float]]
    name: str
    setting: str = "judge.function"

    def compare(
        self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str], columns: Columns
    ) -> Judged:
        """What it says in both orders.

        Raises:
            RewardError: it raised, or gave something else than one finite number a row.
        """
        return Judged(self._ask(prompts, firsts, seconds, columns), -self._ask(prompts, seconds, firsts, columns))

    def scores(self, prompts: Sequence[str], responses: Sequence[str], columns: Columns) -> None:
        """None: it compares."""
        return None

    def _ask(self, prompts: Sequence[str], one: Sequence[str], other: Sequence[str], columns: Columns) -> Floats:
        where = f"{self.setting} {self.name!r}"
        try:
            answer = list(self.function(list(prompts), list(one), list(other), **columns))
        except Exception as error:
            raise RewardError(f"{where} raised {type(error).__name__}: {error}, on {len(prompts)} pairs") from error
        if len(answer) != len(prompts):
            raise RewardError(f"{where} returned {len(answer)} numbers for {len(prompts)} pairs")
        for row, value in enumerate(answer):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise RewardError(
                    f"{where} returned {value!r} for row {row}: prompt {prompts[row][-60:]!r}, responses "
                    f"{one[row][:60]!r} and {other[row][:60]!r}; it must be a finite number, above 0 where the "
                    "first one is better"
                )
        return np.asarray(answer, dtype=np.float64)


def make_judge(context: Context) -> Judge:
    """The judge that the section ``judge`` describes. A judge model is trained here.

    Raises:
        ConfigError: a function cannot be loaded.
        ModelError, DataError, TrainingError: of the judge model's training.
    """
    section = context.config.judge
    match section.by:
        case "rewards":
            weighted = rewards.make_rewards(section.rewards, None)
            return ByScore(lambda *texts: weighted(*texts)[0].tolist())
        case "comparison":
            return ByComparison(rewards.load_function(str(section.function)), str(section.function))
        case "model":
            return ByScore(import_module(JUDGE_MODEL).judge_model(context))  # by name: see rlhf.stages
    raise AssertionError(f"people judged already, so there is no judge {section.by!r}")
