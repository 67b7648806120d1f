import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import ArtifactError
from rlhf.tracking.tracker import JournalTracker
from tasks.mlflow.journal import JOURNAL, PARENT, RunJournal, end_if_abandoned, operations, owner_lives

ROOT = Path(__file__).parents[3]


def records(directory: Path) -> list[dict[str, Any]]:
    return [operation.record for operation in operations(directory)]


def ends(directory: Path) -> list[tuple[str, str]]:
    return [(record["run"], record["status"]) for record in records(directory) if record["op"] == "end"]


def begun(directory: Path) -> RunJournal:
    journal = RunJournal.open(directory)
    journal.start("demo", experiment="rlhf", params={"ppo.kl_coef": 0.05}, tags={"kind": "pipeline"})
    journal.start_stage("sft")
    return journal


def test_writing_it_imports_neither_mlflow_nor_torch() -> None:
    code = (
        "import sys, tasks.mlflow.journal, tasks.mlflow.shipper, tasks.mlflow.sync; "
        "print({'mlflow', 'torch', 'pandas', 'prefect'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_block_that_ends_well_ends_the_runs(tmp_path: Path) -> None:
    with begun(tmp_path) as journal:
        assert owner_lives(tmp_path)
        journal.end("sft")
        journal.start_stage("reward")
    assert ends(tmp_path) == [("sft", "FINISHED"), ("reward", "FINISHED"), (PARENT, "FINISHED")]
    assert not owner_lives(tmp_path)


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_an_error_ends_the_runs_with_its_status(tmp_path: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), begun(tmp_path):
        raise error
    assert ends(tmp_path) == [("sft", status), (PARENT, status)]


def test_curves_go_to_the_stage_and_the_parent(tmp_path: Path) -> None:
    with begun(tmp_path) as journal:
        tracker = JournalTracker(tmp_path / "metrics.jsonl", journal.listener("sft"))
        tracker.log({"sft/loss": 1.0, "sft/lr": math.nan}, step=5)
        tracker.progress(5, 10)
    [metrics] = [record for record in records(tmp_path) if record["op"] == "metrics"]
    assert metrics["runs"] == ["sft", PARENT]
    assert metrics["step"] == 5
    assert metrics["values"] == {"sft/loss": 1.0, "sft/lr": "nan"}


def test_replaying_a_stage_gives_its_points_with_their_own_times(tmp_path: Path) -> None:
    tracker = JournalTracker(tmp_path / "metrics.jsonl")
    for step in range(3):
        tracker.log({"sft/loss": float(step)}, step)
    original = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    with begun(tmp_path / "run") as journal:
        journal.replay("sft", tmp_path / "metrics.jsonl")
        journal.replay("sft", tmp_path / "missing.jsonl")
    replayed = [record for record in records(tmp_path / "run") if record["op"] == "metrics"]
    assert [(r["t"], r["step"], r["values"]) for r in replayed] == [(o["t"], o["step"], o["values"]) for o in original]


def test_finals_never_become_a_point_of_a_curve(tmp_path: Path) -> None:
    with begun(tmp_path) as journal:
        journal.metrics("sft", {"sft/loss": 1.0}, step=5)
        journal.finals("sft", {"sft/loss": 0.5, "sft/rows": 10.0}, headline=["sft/loss"])
    finals = [record for record in records(tmp_path) if record["op"] == "metrics"][1:]
    assert [(record["runs"], record["values"]) for record in finals] == [
        (["sft"], {"sft/final_loss": 0.5, "sft/rows": 10.0}),
        ([PARENT], {"sft/final_loss": 0.5}),
    ]


def test_texts_are_kept_beside_the_journal(tmp_path: Path) -> None:
    with begun(tmp_path) as journal:
        journal.text(PARENT, "config.yaml", "seed: 1\n")
        journal.text(PARENT, "logs/plan.txt", "all")
    artifacts = [record for record in records(tmp_path) if record["op"] == "artifact"]
    assert [Path(record["path"]).read_text() for record in artifacts] == ["seed: 1\n", "all"]
    assert [record["destination"] for record in artifacts] == ["", "logs"]


def test_a_run_has_one_owner(tmp_path: Path) -> None:
    with begun(tmp_path), pytest.raises(ArtifactError, match="belongs to a process"):
        RunJournal.open(tmp_path)
    RunJournal.open(tmp_path).close()


def test_nothing_is_written_about_a_run_that_was_not_started(tmp_path: Path) -> None:
    with begun(tmp_path) as journal:
        with pytest.raises(ValueError, match=r"no run \['ppo'\]"):
            journal.metrics("ppo", {"ppo/kl": 1.0}, step=1)
        with pytest.raises(ValueError, match=r"no run \['ppo'\]"):
            journal.tags("ppo", {"a": 1})
    with pytest.raises(ArtifactError, match="closed"):
        journal.tags(PARENT, {"a": 1})


def test_a_torn_last_line_is_not_read_and_is_dropped_by_the_next_owner(tmp_path: Path) -> None:
    begun(tmp_path).close()
    path = tmp_path / JOURNAL
    whole = path.read_bytes()
    before = len(records(tmp_path))
    path.write_bytes(whole + b'{"op": "tags", "run": "sft", "val')
    assert len(records(tmp_path)) == before
    with RunJournal.open(tmp_path) as journal:
        assert path.read_bytes() == whole
        assert journal.running == (PARENT, "sft")
        journal.start_stage("sft")  # a second attempt, in the same run
        assert journal.running == (PARENT, "sft")
    assert ends(tmp_path) == [("sft", "FINISHED"), (PARENT, "FINISHED")]


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    begun(tmp_path).close()
    size = (tmp_path / JOURNAL).stat().st_size
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b"garbage\n")
    with pytest.raises(ArtifactError, match=f"byte {size}"):
        records(tmp_path)


def test_reading_goes_on_from_an_offset(tmp_path: Path) -> None:
    begun(tmp_path).close()
    first, second = operations(tmp_path)
    assert (first.start, first.end) == (0, second.start)
    assert list(operations(tmp_path, first.end)) == [second]
    assert list(operations(tmp_path, second.end)) == []


def test_an_abandoned_run_is_ended_as_killed(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    assert not end_if_abandoned(tmp_path)
    journal.close()
    assert end_if_abandoned(tmp_path)
    assert end_if_abandoned(tmp_path)
    assert ends(tmp_path) == [("sft", "KILLED"), (PARENT, "KILLED")]


def test_the_owner_killed_by_9_is_found_dead(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tasks.mlflow.journal import RunJournal\n"
        "journal = RunJournal.open(Path(sys.argv[1])); journal.start('demo', experiment='rlhf')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert not owner_lives(tmp_path)
    assert end_if_abandoned(tmp_path)
    assert ends(tmp_path) == [(PARENT, "KILLED")]
