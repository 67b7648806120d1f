"""Some of the responses, to be read: the first ones, and those where the compared policies differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import escape

from rlhf.metrics.labels import label
from rlhf.report.sources import Sources
from rlhf.report.verdict import judge_of
from rlhf.report.words import in_sentence, number, score_name, shortened, visible

MOST = 400  # samples on the page
BYTES = 1_500_000  # of their text as it is written on the page
CHARACTERS = 3_000  # of one text
FIRST = 3  # samples that come first, whatever they are
EXTREMES = 20  # of the samples with the largest gains, and as many with the largest losses


class Answer(NamedTuple):
    """What one policy answered (the references can be several), and how it was scored."""

    who: str
    texts: Sequence[str]
    scores: Sequence[tuple[str, str]]


class Sample(NamedTuple):
    """A prompt with its answers; ``number`` is its place among all, ``why`` what is notable about it."""

    number: int
    why: str
    prompt: str
    answers: Sequence[Answer]


class Samples(NamedTuple):
    """Those that the page has, out of how many; ``before`` and ``after`` are the policies compared at first."""

    shown: Sequence[Sample]
    total: int
    who: Sequence[str]
    before: str
    after: str


def samples(sources: Sources) -> Samples | None:
    """The samples of the evaluation; None where there are none."""
    path = sources.file("evaluate", "samples.parquet")
    if path is None:
        return None
    import pyarrow.parquet as pq  # takes a moment

    columns: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    report = sources.evaluation
    policies = [name for name in report.get("metrics", {}) if name in columns]
    if not columns.get("prompt") or not policies:
        return None
    order = _chosen(columns, sources)
    shown: list[Sample] = []
    size = 0
    for row, why in order.items():
        sample = _sample(columns, row, why, policies, report.get("judged") or [])
        size += _size(sample)
        if len(shown) == MOST or (shown and size > BYTES):
            break
        shown.append(sample)
    comparison: Mapping[str, Any] = next(iter(report.get("comparisons") or []), {})
    after = comparison.get("candidate", policies[-1])
    before = comparison.get("baseline", policies[0])
    return Samples(shown, len(columns["prompt"]), policies, before, after)


def _chosen(columns: Mapping[str, Sequence[Any]], sources: Sources) -> dict[int, str]:
    """Rows in the order in which they are shown, and what is notable about each."""
    notable = _notable(columns, sources)
    rows = range(min(len(columns["prompt"]), MOST))
    return {row: notable.get(row, "") for row in [*rows[:FIRST], *notable, *rows[FIRST:]]}


def _notable(columns: Mapping[str, Sequence[Any]], sources: Sources) -> dict[int, str]:
    """The largest losses and gains of the first comparison, in turns."""
    comparison = next(iter(sources.evaluation.get("comparisons") or []), None)
    metric = judge_of(sources, comparison) if comparison is not None else None
    new, old = ((columns.get(f"{comparison[who]}_{metric}") if comparison is not None else None)
                for who in ("candidate", "baseline"))  # fmt: skip
    if metric is None or new is None or old is None:
        return {}
    change = np.array(new, dtype=np.float64) - np.array(old, dtype=np.float64)
    order = [int(row) for row in np.argsort(change, kind="stable") if not np.isnan(change[row])]
    losses = [row for row in order if change[row] < 0][:EXTREMES]
    gains = [row for row in reversed(order) if change[row] > 0][:EXTREMES]
    found = {}
    for place in range(EXTREMES):
        for name, rows in (("loss", losses), ("gain", gains)):
            if place < len(rows):
                found[rows[place]] = f"{name} no. {place + 1} by {in_sentence(score_name(metric))}"
    return found


def _sample(
    columns: Mapping[str, Sequence[Any]], row: int, why: str, policies: Sequence[str], judged: Sequence[str]
) -> Sample:
    answers = []
    for who in policies:
        text = columns[who][row]
        texts = [one for one in ([text] if isinstance(text, str) else text or []) if isinstance(one, str)]
        if not texts:
            continue
        scores = [
            (score_name(name), number(columns[f"{who}_{name}"][row], label(name).digits))
            for name in judged
            if f"{who}_{name}" in columns
        ]
        answers.append(Answer(who, [shortened(visible(one), CHARACTERS) for one in texts], scores))
    return Sample(row + 1, why, shortened(visible(str(columns["prompt"][row])), CHARACTERS), answers)


def _size(sample: Sample) -> int:
    """Bytes of a sample's texts on the page."""
    texts = [sample.prompt, *(text for answer in sample.answers for text in answer.texts)]
    return sum(len(str(escape(text)).encode("utf-8")) for text in texts)
