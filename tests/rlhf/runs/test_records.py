"""The records of runs: who was killed does not count as running."""

from __future__ import annotations

from pathlib import Path

from rlhf.runs.records import OWNER, RunRecord, read_runs
from rlhf.store.locks import lock, unlock


def test_a_record_whose_owner_is_gone_is_of_an_interrupted_run(tmp_path: Path) -> None:
    for name, status in (("1", "running"), ("2", "running"), ("3", "done")):
        RunRecord(name, "demo", status, 0.0).write(tmp_path)
    held = lock(tmp_path / "runs" / "2" / OWNER)
    assert held is not None
    assert [record.status for record in read_runs(tmp_path)] == ["interrupted", "running", "done"]
    unlock(held)
    assert [record.status for record in read_runs(tmp_path)] == ["interrupted", "interrupted", "done"]


def test_a_record_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    RunRecord("1", "demo", "done", 0.0).write(tmp_path)
    RunRecord("2", "demo", "done", 0.0).write(tmp_path)
    (tmp_path / "runs" / "1" / "run.json").write_text('{"id": "1"')
    assert [record.id for record in read_runs(tmp_path)] == ["2"]
