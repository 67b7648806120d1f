"""The record of every pipeline run on this machine: ``<home>/runs/<run id>/run.json``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from rlhf.errors import ConfigError
from rlhf.store.locks import is_locked

CHAMPION = "champion:"
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


def find_run(home: Path, name: str) -> RunRecord:
    """The run that a person means: by its id, ``champion:PIPELINE``, or a pipeline's name, its last finished run.

    Raises:
        ConfigError: there is none.
        ArtifactError: the pipeline's record of its champion is damaged.
    """
    records = read_runs(home)
    wanted = _champion(home, name.removeprefix(CHAMPION)) if name.startswith(CHAMPION) else name
    for record in reversed(records):
        if record.id == wanted or (record.pipeline == wanted and record.status == "done"):
            return record
    known = {record.id for record in records} | {record.pipeline for record in records if record.status == "done"}
    close = get_close_matches(wanted, sorted(known), n=1, cutoff=0.3)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(
        f"{name!r} is neither a run in {home / 'runs'} nor a pipeline with a finished run; {hint}`rlhf runs` lists them"
    )


def _champion(home: Path, pipeline: str) -> str:
    from rlhf.champions.history import (
        champion,  # it looks at stages and their keys, which the record of a run does not need
    )

    found = champion(home, pipeline)
    if found is None:
        raise ConfigError(f"{CHAMPION}{pipeline}: that pipeline has no champion yet")
    return found.run_id
