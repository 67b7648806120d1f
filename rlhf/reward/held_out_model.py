"""The two trainings of the stage: the reward model that PPO learns from, and the held-out one, which only judges.

The second has another seed, so another order of the rows and other random weights, of the head and of LoRA (where both
start from a trained reward model, its head is that of both). All else is the same: what one of them likes and the other
does not is an accident of its training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rlhf.reward.accuracy import CONFIDENCE, RESAMPLES, Scores, wins
from rlhf.statistics.intervals import bootstrap_interval
from rlhf.store import checkpoints
from rlhf.tracking.tracker import NullTracker, Tracker

if TYPE_CHECKING:
    from rlhf.context import Context

HELD_OUT = "held_out"  # folder of the second model and of its checkpoints, and part of the names of its metrics
SEEDS = 2**32


@dataclass(frozen=True)
class Part:
    """The tracker of one of several trainings of equal length, whose curves may have a name of their own."""

    tracker: Tracker
    number: int  # from 0
    count: int
    name: str = ""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Pass points on: ``reward/loss`` as ``reward/<name>/loss``."""
        if self.name:
            values = {curve.replace("/", f"/{self.name}/", 1): value for curve, value in values.items()}
        self.tracker.log(values, step)

    def progress(self, done: int, total: int, **live: float) -> None:
        """Pass on how far all of them are."""
        self.tracker.progress(self.number * total + done, self.count * total, **live)

    def mark(self) -> int:
        """That of the journal, which they share."""
        return self.tracker.mark()

    def rewind(self, mark: int) -> None:
        """Cut the journal, which they share."""
        self.tracker.rewind(mark)


def trainings(context: Context) -> list[Context]:
    """The context of the training, or with ``reward.held_out`` those of both.

    Once the second has a checkpoint, the first has ended, and the journal has its curves: it then takes up its last
    checkpoint without a word, and the journal goes back to where the second was.
    """
    if not context.config.reward.held_out:
        return [context]
    place, seed = context.checkpoints / HELD_OUT, (context.config.seed + 1) % SEEDS
    before = NullTracker() if checkpoints.latest(place) else context.tracker
    other = context.config.model_copy(update={"seed": seed})
    return [
        replace(context, tracker=Part(before, 0, 2)),
        replace(context, tracker=Part(context.tracker, 1, 2, HELD_OUT), config=other, checkpoints=place),
    ]


def agreement(one: Scores, other: Scores) -> float:
    """The share of N pairs, at least one, that two models order alike; a tie is like a tie only."""
    orders = (np.sign(scores.chosen - scores.rejected) for scores in (one, other))
    return float(np.equal(*orders).mean())


def finals(first: Scores, second: Scores, seed: int) -> dict[str, float]:
    """Figures of the second model on the held-out pairs, by the names of their metrics; none where there are none."""
    if not len(first.chosen):
        return {}
    accuracy = bootstrap_interval(wins(second), CONFIDENCE, RESAMPLES, seed)
    figures = {
        "test_accuracy": accuracy.value,
        "test_accuracy_low": accuracy.low,
        "test_accuracy_high": accuracy.high,
        "agreement": agreement(first, second),
    }
    return {f"{HELD_OUT}/{name}": value for name, value in figures.items()}
