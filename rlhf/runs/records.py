"""The record of every pipeline run on this machine: ``<home>/runs/<run id>/run.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.store.locks import is_locked

RECORD = "run.json"
REPORT = "report.html"  # beside it; for people
OWNER = "owner.lock"  # beside it; held as long as the run's process lives


@dataclass
class RunRecord:
    """What a run was asked and what became of it. Times are unix seconds.

    ``stages`` maps each stage that finished to its ``key``, ``digest``, whether it was ``cached``, and ``seconds``.
    """

    id: str
    pipeline: str
    status: Literal["running", "done", "failed", "interrupted"]
    started: float
    ended: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str = ""

    def write(self, home: Path) -> None:
        """Replace the record in one step."""
        path = home / "runs" / self.id / RECORD
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        os.replace(temporary, path)


def read_runs(home: Path) -> list[RunRecord]:
    """All runs, oldest first. A record that cannot be read is left out. Who was killed counts as interrupted."""
    records = []
    for path in sorted((home / "runs").glob(f"*/{RECORD}")):
        lives = is_locked(path.with_name(OWNER))  # before the record is read: it may end in between
        try:
            record = RunRecord(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            continue
        if record.status == "running" and not lives:
            record.status = "interrupted"
        records.append(record)
    return records


def report_of(keys: Mapping[str, str | None], home: Path) -> Path | None:
    """The report of the last run that had these very artifacts, by their keys; None where there is none."""
    for record in reversed(read_runs(home)):
        path = home / "runs" / record.id / REPORT
        if {stage: row["key"] for stage, row in record.stages.items()} == keys and path.is_file():
            return path.resolve()
    return None
