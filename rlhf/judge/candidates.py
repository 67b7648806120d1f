"""The responses that are judged, and what the verdicts make of them: pairs, rankings or ratings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.judge.judges import Judge
from rlhf.stages import JUDGE_SAMPLING
from rlhf.statistics.intervals import Floats

if TYPE_CHECKING:
    from rlhf.context import Context

TEXTS = ("prompt", "chosen", "rejected", "margin", "difference", "ranking", "response", "score")
JUDGED_AT_ONCE = 4096  # responses


@dataclass
class Group:
    """The different responses to one prompt, none where all were blank, and the prompt's other columns."""

    prompt: str
    responses: list[str]
    columns: Mapping[str, Any]
    dropped: int = 0  # responses that were blank, or the same as another one


@dataclass
class Verdicts:
    """Groups with ``better`` (K, K) each: by how much response i is better than j; and the scores, where there are."""

    groups: list[Group]
    better: list[Floats] = field(default_factory=list)
    scores: list[Floats] | None = None

    def pairs(self, best_and_worst: bool, min_margin: float) -> pa.Table:
        """Each group's best and worst response as a pair, or all pairs; those within ``min_margin`` are ties, and none.

        ``difference`` is by how much the judge prefers one. It is in the judge's own units, and so no margin of a loss.
        """
        columns: dict[str, list[Any]] = {name: [] for name in ("prompt", "chosen", "rejected", "difference", "ranking")}
        for number, (group, better) in enumerate(zip(self.groups, self.better, strict=True)):
            order = np.argsort(-better.sum(axis=1), kind="stable")
            ends = [(order[0], order[-1])] if best_and_worst and len(order) else combinations(order, 2)
            for one, other in ends:
                if better[one, other] < 0:
                    one, other = other, one
                if better[one, other] > min_margin:
                    row = (group.prompt, group.responses[one], group.responses[other], better[one, other], number)
                    for column, value in zip(columns.values(), row, strict=True):
                        column.append(value)
        if best_and_worst:
            del columns["ranking"]
        kinds = {"difference": pa.float64(), "ranking": pa.int64()}
        return pa.table({name: pa.array(values, kinds.get(name, pa.string())) for name, values in columns.items()})

    def ratings(self) -> pa.Table:
        """Each response with its score."""
        assert self.scores is not None  # the configuration: a judge that compares gives no ratings
        rows = [
            (group.prompt, response, float(score))
            for group, scores in zip(self.groups, self.scores, strict=True)
            for response, score in zip(group.responses, scores, strict=True)
        ]
        kinds = (pa.string(), pa.string(), pa.float64())
        found = list(zip(*rows, strict=True)) or [(), (), ()]
        names = ("prompt", "response", "score")
        return pa.table({n: pa.array(values, kind) for n, values, kind in zip(names, found, kinds, strict=True)})


def of_split(context: Context, split: str) -> list[Group]:
    """What is judged in a split: samples of the policy, or the pairs of the data.

    Raises:
        ModelError: the policy cannot be loaded.
        DataError: a prompt leaves no room for a response.
    """
    section = context.config.judge
    if not section.samples:
        columns = pq.read_table(context.input(f"prepare/preferences/{split}.parquet")).to_pydict()
        rest = others(columns)
        return [
            Group(prompt, [chosen, rejected], {name: values[row] for name, values in rest.items()})
            for row, (prompt, chosen, rejected) in enumerate(
                zip(columns["prompt"], columns["chosen"], columns["rejected"], strict=True)
            )
        ]
    columns = pq.read_table(context.input(f"prepare/prompts/{split}.parquet")).slice(0, section.prompts).to_pydict()
    if not columns["prompt"]:
        return []
    sampled = import_module(JUDGE_SAMPLING).samples(context, split, columns["prompt"])  # by name: see rlhf.stages
    return [
        _group(prompt, answers, {name: values[row] for name, values in columns.items() if name != "prompt"}, context)
        for row, (prompt, answers) in enumerate(zip(columns["prompt"], sampled, strict=True))
    ]


def _group(prompt: str, answers: list[str], columns: dict[str, Any], context: Context) -> Group:
    reference = columns.get("reference")
    given = [*answers, *([reference] if context.config.judge.with_reference and reference else [])]
    different = list(dict.fromkeys(text for text in given if text.strip()))
    return Group(prompt, different, columns, len(given) - len(different))


def judged(judge: Judge, groups: list[Group]) -> Verdicts:
    """The judge's verdicts on all responses of all groups.

    Raises:
        RewardError: a function failed.
    """
    scores = _scores(judge, groups)
    if scores is not None:
        return Verdicts(groups, [one[:, None] - one[None, :] for one in scores], scores)
    better = []
    for group in groups:
        table = np.zeros((len(group.responses),) * 2)
        pairs = list(combinations(range(len(group.responses)), 2))
        if pairs:
            firsts, seconds = ([group.responses[pair[side]] for pair in pairs] for side in (0, 1))
            columns = {name: [value] * len(pairs) for name, value in group.columns.items()}
            margins = judge.compare([group.prompt] * len(pairs), firsts, seconds, columns).margins
            for (one, other), margin in zip(pairs, margins, strict=True):
                table[one, other], table[other, one] = margin, -margin
        better.append(table)
    return Verdicts(groups, better)


def _scores(judge: Judge, groups: list[Group]) -> list[Floats] | None:
    """The scores of each group's responses; None for a judge that compares."""
    found: list[Floats] = []
    waiting: list[Group] = []

    def flush() -> bool:
        prompts = [group.prompt for group in waiting for _ in group.responses]
        responses = [text for group in waiting for text in group.responses]
        names = waiting[0].columns if waiting else ()
        columns = {name: [group.columns[name] for group in waiting for _ in group.responses] for name in names}
        scores = judge.scores(prompts, responses, columns)
        if scores is None:
            return False
        found.extend(np.split(scores, np.cumsum([len(group.responses) for group in waiting])[:-1]))
        waiting.clear()
        return True

    for group in groups:
        waiting.append(group)
        if sum(len(one.responses) for one in waiting) >= JUDGED_AT_ONCE and not flush():
            return None
    return found if not waiting or flush() else None


def others(columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """The columns beside those of a pair or rating."""
    return {name: values for name, values in columns.items() if name not in TEXTS}
