"""Some of the responses, to be read: the first ones, and those where the compared policies differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import escape

from rlhf.labels import label
from rlhf.report.model import Sources
from rlhf.report.verdict import judge_of
from rlhf.report.words import number, score_name, shortened, visible

MOST = 400  # samples on the page
BYTES = 1_500_000  # of their text as it is written on the page
CHARACTERS = 3_000  # of one text
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
    count = len(columns["prompt"])
    rows: dict[int, str] = {}
    comparison = next(iter(sources.evaluation.get("comparisons") or []), None)
    metric = judge_of(sources, comparison) if comparison is not None else None
    if comparison is not None and metric is not None:
        new, old = (columns.get(f"{comparison[who]}_{metric}") for who in ("candidate", "baseline"))
        if new is not None and old is not None:
            change = np.array(new, dtype=np.float64) - np.array(old, dtype=np.float64)
            order = [int(row) for row in np.argsort(change, kind="stable") if not np.isnan(change[row])]
            by = score_name(metric)
            for title, found in (("loss", [r for r in order if change[r] < 0]),
                                 ("gain", [r for r in order[::-1] if change[r] > 0])):  # fmt: skip
                rows |= {row: f"{_ordinal(place)} {title} by {by}" for place, row in enumerate(found[:EXTREMES])}
    first = [row for row in range(min(count, MOST)) if row not in rows]
    notable = list(rows)
    return {row: rows.get(row, "") for row in [*first[:3], *_alternating(notable, EXTREMES), *first[3:]]}


def _alternating(rows: Sequence[int], half: int) -> list[int]:
    """The losses and the gains in turns, the largest first."""
    losses, gains = rows[:half], rows[half:]
    longest = max(len(losses), len(gains))
    return [of[i] for i in range(longest) for of in (losses, gains) if i < len(of)]


def _ordinal(place: int) -> str:
    return "largest" if place == 0 else f"no. {place + 1}"


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
