"""What people said of a run's responses: blind sheets (``rlhf.feedback.sheets``) read back, and kept.

What people said is in ``<home>/verdicts/<run id>.json``, one entry a reader::

    {"run": id,
     "readers": {name: {"sheet", "candidate", "baseline", "when",
                        "rows": [{"prompt_row": 3, "verdict": "candidate" | "baseline" | "tie", "identical": false}],
                        "win_rate": {"value", "low", "high", "n"}, "wins", "ties", "losses",
                        "agreement": {score: {"value", "low", "high", "n"}}}},
     "between": [{"readers": [name, name], "rows", "agreement", "kappa", "kappa_low", "kappa_high"}]}

``prompt_row`` counts the rows of the evaluation's samples.parquet from 0; ``identical`` rows were not shown. ``wins``,
``ties`` and ``losses`` are shares. ``agreement`` of a score: how often it prefers the response that the person did,
over the rows in which that was one of the two; a tie of the score counts half.
"""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.errors import ArtifactError, ConfigError, DataError
from rlhf.feedback.sheets import COLUMNS, Key, Row, Side, check_ending, digest_of, plain, unguarded
from rlhf.statistics.agreement import agreement
from rlhf.statistics.intervals import Estimate, Floats, wilson_interval, win_shares, without_nan
from rlhf.store.artifacts import write_json
from rlhf.store.locks import locked

Verdict = Literal["candidate", "baseline", "tie"]
NEEDED = COLUMNS[:5]  # a comment is nobody's duty
VERDICTS = {"a": "A", "b": "B", "tie": "tie"}
SHOWN = 5  # problems of a file in one message


def read(path: Path, home: Path) -> tuple[Key, dict[int, Verdict]]:
    """The key of a sheet that came back, and the verdicts in it by ``prompt_row``.

    CSV may be separated by commas, semicolons or tabs, in UTF-8 or UTF-16. Rows may be in any order, missing, or
    without a verdict; columns and verdicts in upper or lower case, with blanks around them.

    Raises:
        ConfigError: the file is neither .csv nor .parquet.
        DataError: the file cannot be read, is no sheet made here, has a row that is not the sheet's, a text that was
            changed, a verdict that is not one, or none at all. Rows are named as a spreadsheet program counts them.
    """
    lines = _lines(path)
    key = _key(path, lines, home)
    rows = {row.id: row for row in key.rows}
    found: dict[int, Verdict] = {}
    seen: dict[str, int] = {}
    problems = []
    for number, line in lines:
        name, given = line["id"].strip(), plain(line["verdict"])
        row, verdict = rows.get(name), VERDICTS.get(given.lower())
        if row is None:
            problems.append(f"row {number}: id {name!r} is not in sheet {key.sheet}")
        elif name in seen:
            problems.append(f"row {number}: id {name!r} is in row {seen[name]} already")
        elif digest_of(line["prompt"], line["a"], line["b"]) != row.texts:
            problems.append(f"row {number}: the prompt or a response of {name!r} is not what the sheet showed")
        elif given and verdict is None:
            problems.append(f"row {number}: verdict {given!r}; allowed are A, B, tie, or nothing")
        elif verdict is not None:
            found[row.prompt_row] = "tie" if verdict == "tie" else row.a if verdict == "A" else _other(row.a)
        seen[name] = number
    if problems:
        more = f"\nand {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError(f"{path} is not kept:\n" + "\n".join(problems[:SHOWN]) + more)
    if not found:
        raise DataError(f"{path}: the column verdict is empty; write A, B or tie into it")
    return key, found


def keep(key: Key, verdicts: Mapping[int, Verdict], reader: str, home: Path) -> dict[str, Any]:
    """Keep what a reader said, in the place of what the same reader said of this sheet before; the reader's entry.

    Raises:
        ConfigError: the reader has no name, or has judged another sheet of this run under it.
        ArtifactError: the file of the run's verdicts is damaged.
    """
    if not reader.strip():
        raise ConfigError("--by is empty; it names who has judged")
    path = home / "verdicts" / f"{key.run}.json"
    with locked(home / "locks" / f"verdicts-{key.run}.lock"):
        readers = kept(home, key.run)["readers"]
        before = readers.get(reader, {"sheet": key.sheet})
        if before["sheet"] != key.sheet:
            raise ConfigError(
                f"{reader!r} has judged another sheet of run {key.run}, {before['candidate']} against "
                f"{before['baseline']}; both are kept if you give this one another name, such as "
                f"--by {reader + ' (2)'!r}"
            )
        readers[reader] = without_nan(_entry(key, verdicts))
        write_json(path, {"run": key.run, "readers": readers, "between": _between(readers)})
    return dict(readers[reader])


def kept(home: Path, run_id: str) -> dict[str, Any]:
    """What people said of a run, as in its file; without one, no readers.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = home / "verdicts" / f"{run_id}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"run": str(found["run"]), "readers": dict(found["readers"]), "between": list(found["between"])}
    except FileNotFoundError:
        return {"run": run_id, "readers": {}, "between": []}
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete it, and read the sheets again") from None


def _lines(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The lines of a sheet with their row numbers, by columns in lower case."""
    check_ending(path)
    try:
        if path.suffix == ".parquet":
            rows = pq.read_table(path).to_pylist()
            head: Sequence[str] = list(rows[0]) if rows else []
            table = [["" if row[name] is None else str(row[name]) for name in head] for row in rows]
        else:
            head, *table = _csv(path.read_bytes())
            table = [[unguarded(cell) for cell in row] for row in table]
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}; save it as CSV (UTF-8) or Parquet") from None
    names = [name.strip().lower() for name in head]
    if missing := [name for name in NEEDED if name.lower() not in names]:
        raise DataError(f"{path} has no column {', '.join(missing)}; a sheet has {', '.join(COLUMNS)}")
    first = 1 if path.suffix == ".parquet" else 2
    return [
        (number, dict(zip(names, row, strict=False)))
        for number, row in enumerate(table, first)
        if any(cell.strip() for cell in row)
    ]


def _csv(content: bytes) -> list[list[str]]:
    """The rows of a CSV file, by the separator under which its first row is that of a sheet."""
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = re.sub(r"\Asep=.\r?\n", "", content.decode(encoding))
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    tables = [list(csv.reader(io.StringIO(text, newline=""), delimiter=separator)) for separator in ",;\t"]
    return max(tables, key=lambda table: len(table[0]) if table else 0) or [[]]


def _key(path: Path, lines: Sequence[tuple[int, Mapping[str, str]]], home: Path) -> Key:
    """The key of the sheet that the ids name."""
    if not lines:
        raise DataError(f"{path} has no row")
    number, first = lines[0]
    sheet = first["id"].strip().rpartition("-")[0]
    file = home / "sheets" / f"{sheet}.json"
    if not re.fullmatch(r"[0-9a-f]+", sheet) or not file.is_file():
        raise DataError(f"{path}, row {number}: id {first['id']!r} is of no sheet that was made in {file.parent}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return Key(
            **found | {"rows": tuple(Row(**row) for row in found["rows"]), "identical": tuple(found["identical"])}
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{file} is damaged: {error}") from None


def _other(side: Side) -> Side:
    return "baseline" if side == "candidate" else "candidate"


def _entry(key: Key, verdicts: Mapping[int, Verdict]) -> dict[str, Any]:
    """What a reader's verdicts say; of the identical rows, as large a share counts as was judged of the others."""
    ties = key.identical[: round(len(key.identical) * len(verdicts) / len(key.rows))]
    rows = [{"prompt_row": row, "verdict": verdict, "identical": False} for row, verdict in verdicts.items()]
    rows += [{"prompt_row": row, "verdict": "tie", "identical": True} for row in ties]
    rows.sort(key=lambda row: row["prompt_row"])
    points = {"candidate": 1.0, "tie": 0.5, "baseline": 0.0}
    values = np.array([points[str(row["verdict"])] for row in rows])
    return {
        "sheet": key.sheet,
        "candidate": key.candidate,
        "baseline": key.baseline,
        "when": time.time(),
        "rows": rows,
        "win_rate": _rate(values, key.confidence)._asdict(),
        **win_shares(values, 1 - values)._asdict(),
        "agreement": _with_scores(key, verdicts),
    }


def _with_scores(key: Key, verdicts: Mapping[int, Verdict]) -> dict[str, Any]:
    """How often each score prefers what the person did."""
    found: dict[str, Any] = {}
    for score in key.rows[0].scores:
        agrees = []
        for row in key.rows:
            ours, theirs = row.scores[score]
            verdict = verdicts.get(row.prompt_row, "tie")
            if verdict != "tie" and ours is not None and theirs is not None:
                prefers = float(np.sign(ours - theirs)) * (1 if verdict == "candidate" else -1)
                agrees.append((prefers + 1) / 2)
        found[score] = _rate(np.array(agrees), key.confidence)._asdict()
    return found


def _rate(values: Floats, confidence: float) -> Estimate:
    """The mean of values of 0, 0.5 or 1 (n,), with Wilson's (1927) score interval.

    Of few verdicts that all say the same, a bootstrap would be sure. Ties vary less than wins and losses, so that with
    many of them the interval is too wide rather than too narrow.
    """
    n = len(values)
    if n == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    mean = float(values.mean())
    return Estimate(mean, *wilson_interval(mean, n, confidence), n)


def _between(readers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Agreement and Cohen's kappa of each two readers, over the rows that both were shown and judged."""
    found = []
    for names in combinations(sorted(readers), 2):
        one, other = (readers[name] for name in names)
        if (one["candidate"], one["baseline"]) != (other["candidate"], other["baseline"]):
            continue
        verdicts = [
            {row["prompt_row"]: row["verdict"] for row in e["rows"] if not row["identical"]} for e in (one, other)
        ]
        shared = sorted(verdicts[0].keys() & verdicts[1].keys())
        categories = {"candidate": 0, "tie": 1, "baseline": 2}
        agreed = agreement(*([categories[said[row]] for row in shared] for said in verdicts))
        found.append({"readers": list(names), **agreed._asdict(), "rows": agreed.pairs})
        del found[-1]["pairs"]
    return found
