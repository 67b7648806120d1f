"""Blind sheets: people judge pairs of responses without knowing which policy wrote which, and are read back.

A sheet is a CSV file (UTF-8 with BOM, so that spreadsheet programs take it as that) or a Parquet file with the columns
id, prompt, A, B, verdict (to be filled in: A, B or tie) and comment. Which side is whose is in
``<home>/sheets/<sheet>.json`` and not in the file. Prompts to which both policies gave the same text are not shown, and
count as ties.

In CSV, a cell that a spreadsheet program would run as a formula or rewrite as a number gets an apostrophe before it:
one that begins with ``=``, ``+``, ``-``, ``@``, a tab or a line break, or is all digits and signs, and also one that
begins with an apostrophe itself. Reading takes one apostrophe off, so that nothing is lost.

``rlhf.feedback.verdicts`` reads back what people filled in.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.errors import ArtifactError, ConfigError, NotCachedError
from rlhf.runs.records import RunRecord
from rlhf.store.artifacts import Store, write_json

COLUMNS = ("id", "prompt", "A", "B", "verdict", "comment")
GUARDED = re.compile(r"[=+\-@\t\r\n']|[\d\s.,:;/%+\-]+$")  # what begins like this, or is nothing else

Side = Literal["candidate", "baseline"]


class Row(NamedTuple):
    """A line of the key: who is on side A, what the line says, and what each score gave (candidate, baseline)."""

    id: str
    prompt_row: int
    a: Side
    texts: str  # digest of prompt, A and B
    scores: dict[str, list[float | None]]


@dataclass(frozen=True)
class Key:
    """What a sheet does not say. ``identical`` are rows of the samples that both policies answered with one text."""

    sheet: str
    run: str
    candidate: str
    baseline: str
    rows: tuple[Row, ...]
    identical: tuple[int, ...]
    confidence: float  # of the intervals of what people say


class Sheet(NamedTuple):
    """The lines for people, by column, and the key to them."""

    columns: dict[str, list[str]]
    key: Key


# --------------------------------------------------------------------------------------------------- making a sheet
def make(record: RunRecord, store: Store, policies: str | None = None, rows: int | None = None, seed: int = 0) -> Sheet:
    """A sheet of a run's evaluation; the same arguments give the same one.

    Args:
        policies: ``candidate,baseline`` of base, sft, ppo and reference; default: the last policy and the one before.
        rows: how many of the prompts that both answered, drawn at random; default: all.

    Raises:
        ConfigError: the evaluation lacks a policy, or the two never differ.
        NotCachedError: the run has no evaluation, or the store has it no more.
    """
    samples = _samples(record, store)
    known = [name for name in ("base", "sft", "ppo", "reference") if name in samples.column_names]
    candidate, baseline = _policies(policies, known)
    ours, theirs = (_texts(samples[name].to_pylist()) for name in (candidate, baseline))
    both = [row for row, pair in enumerate(zip(ours, theirs, strict=True)) if None not in pair]
    named = json.dumps([record.id, record.stages["evaluate"]["digest"], candidate, baseline, rows, seed])
    digest = hashlib.sha256(named.encode()).digest()
    generator = np.random.default_rng(list(digest))  # of another run, other sides
    chosen = [both[index] for index in generator.permutation(len(both))[: rows or len(both)]]
    sides = generator.integers(0, 2, size=len(chosen))
    prompts = samples["prompt"].to_pylist()
    scores = _scores(record, samples, candidate, baseline)
    sheet, lines = digest.hex()[:8], list[Row]()
    columns: dict[str, list[str]] = {name: [] for name in COLUMNS}
    for row, flip in zip(chosen, sides, strict=True):
        one, other = str(ours[row]), str(theirs[row])
        if plain(one) == plain(other):
            continue
        a, b = (other, one) if flip else (one, other)
        line = Row(
            f"{sheet}-{len(lines) + 1:04d}",
            row,
            "baseline" if flip else "candidate",
            digest_of(prompts[row], a, b),
            {name: [_json(values[0][row]), _json(values[1][row])] for name, values in scores.items()},
        )
        lines.append(line)
        for name, text in zip(COLUMNS, (line.id, prompts[row], a, b, "", ""), strict=True):
            columns[name].append(text)
    if not lines:
        raise ConfigError(
            f"run {record.id}: {candidate} and {baseline} never differ in {len(chosen)} answers; choose others"
        )
    confidence = record.config.get("evaluate", {}).get("confidence", 0.95)
    identical = tuple(sorted(set(chosen) - {line.prompt_row for line in lines}))
    return Sheet(columns, Key(sheet, record.id, candidate, baseline, tuple(lines), identical, confidence))


def write(sheet: Sheet, out: Path, home: Path) -> Path:
    """Write the file, and the key; where the key is.

    Raises:
        ConfigError: the file is there already, which may hold verdicts, or has another ending than .csv or .parquet.
    """
    check_ending(out)
    if out.exists():
        raise ConfigError(f"--out {out} is there already, and may hold verdicts; choose another name, or delete it")
    key = home / "sheets" / f"{sheet.key.sheet}.json"
    write_json(key, asdict(sheet.key) | {"rows": [row._asdict() for row in sheet.key.rows]})
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".parquet":
        pq.write_table(pa.table(sheet.columns, pa.schema([(name, pa.string()) for name in COLUMNS])), out)
    else:
        with out.open("x", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows([map(guarded, line) for line in zip(*sheet.columns.values(), strict=True)])
    return key


def _samples(record: RunRecord, store: Store) -> pa.Table:
    if "evaluate" not in record.stages:
        raise NotCachedError(f"run {record.id} has no evaluation, whose answers a sheet shows; `rlhf runs` lists runs")
    key = record.stages["evaluate"]["key"]
    try:
        store.open("evaluate", key)
    except ArtifactError as error:
        raise NotCachedError(f"the evaluation of run {record.id} is not in the store any more ({error})") from None
    return pq.read_table(store.path("evaluate", key) / "samples.parquet")


def _policies(text: str | None, known: Sequence[str]) -> tuple[str, str]:
    """The candidate and the baseline."""
    trained = [name for name in known if name != "reference"]
    names = [name.strip() for name in text.split(",")] if text else [*reversed(trained), "reference"][:2]
    if len(names) != 2 or names[0] == names[1] or not set(names) <= set(known):
        raise ConfigError(f"--policies {','.join(names)}: expected two of {', '.join(known)}, such as ppo,sft")
    return names[0], names[1]


def _texts(values: Sequence[Any]) -> list[str | None]:
    """A text for each row; of several references the first, None where there is none."""
    firsts = [(value[0] if value else None) if isinstance(value, list) else value for value in values]
    return [None if value is None else str(value) for value in firsts]


def _scores(record: RunRecord, samples: pa.Table, candidate: str, baseline: str) -> dict[str, list[list[Any]]]:
    """What each judge score gave both, by the rows of the samples."""
    names = ("reward", "held_out", *record.config.get("evaluate", {}).get("scorers", {}))
    columns = {name: [f"{policy}_{name}" for policy in (candidate, baseline)] for name in names}
    there = set(samples.column_names)
    return {name: [samples[c].to_pylist() for c in pair] for name, pair in columns.items() if set(pair) <= there}


def _json(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def plain(text: str) -> str:
    """A text without what spreadsheet programs change: kinds and runs of white space."""
    return " ".join(text.split())


def digest_of(*texts: str) -> str:
    """What identifies the texts of a line, as far as spreadsheet programs leave them."""
    return hashlib.sha256(json.dumps([plain(text) for text in texts]).encode()).hexdigest()


def guarded(cell: str) -> str:
    """A cell that no spreadsheet program runs or rewrites."""
    return f"'{cell}" if GUARDED.match(cell) else cell


def unguarded(cell: str) -> str:
    """The cell that was guarded."""
    return cell.removeprefix("'")


def check_ending(path: Path) -> None:
    """Raise a ConfigError for what is neither CSV nor Parquet."""
    if path.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"{path}: a sheet is a .csv or a .parquet file")
