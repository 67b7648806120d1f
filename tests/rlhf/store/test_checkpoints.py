"""Checkpoints: whole and sealed, or passed over."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from rlhf.store import checkpoints
from rlhf.store.hashing import manifest_of


def write(path: Path) -> None:
    (path / "sub").mkdir()
    (path / "model.bin").write_bytes(b"weights")
    (path / "sub" / "state.json").write_text("{}")


def test_save_seals_every_file_and_returns_the_path(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path / "new" / "folder", 7, write)
    assert path == tmp_path / "new" / "folder" / "checkpoint-7"
    assert json.loads((path / "manifest.json").read_text())["files"] == {
        "model.bin": {"size": 7, "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"},
        "sub/state.json": {"size": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"},
    }
    assert checkpoints.problem(path) is None
    assert checkpoints.latest(path.parent) == path


def test_latest_orders_by_step_as_a_number(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoints.save(tmp_path, step, write, keep=3)
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-100"


def test_latest_of_nothing(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.latest(tmp_path / "not there") is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, write, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, write)
    checkpoints.save(tmp_path, 1, lambda path: (path / "other").touch())
    assert list(manifest_of(tmp_path / "checkpoint-1")) == ["other"]


def test_a_write_that_fails_leaves_no_checkpoint_and_the_earlier_one(tmp_path: Path) -> None:
    first = checkpoints.save(tmp_path, 1, write)

    def fail(path: Path) -> None:
        write(path)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(tmp_path, 2, fail)
    assert checkpoints.latest(tmp_path) == first
    assert checkpoints.latest(tmp_path) == checkpoints.save(tmp_path, 1, write)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]  # the half-written one is gone


def truncate(path: Path) -> None:
    (path / "model.bin").write_bytes(b"weigh")


def flip(path: Path) -> None:
    (path / "model.bin").write_bytes(b"Weights")


DAMAGES = {
    "truncated": (truncate, "model.bin has changed"),
    "one byte": (flip, "model.bin has changed"),
    "file missing": (lambda path: (path / "sub" / "state.json").unlink(), "sub/state.json is missing"),
    "file too many": (lambda path: (path / "extra").touch(), "extra is not in its manifest"),
    "unsealed": (lambda path: (path / "manifest.json").unlink(), "writing was interrupted"),
    "manifest cut": (lambda path: (path / "manifest.json").write_text('{"files": {'), "cannot be read"),
    "manifest of another form": (lambda path: (path / "manifest.json").write_text('{"files": 3}'), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    good, bad = checkpoints.save(tmp_path, 1, write), checkpoints.save(tmp_path, 2, write)
    harm, reason = DAMAGES[damage]
    harm(bad)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.latest(tmp_path) == good
    assert re.search(f"{re.escape(str(bad))}.*{re.escape(reason)}", caplog.text)


def test_seal_of_a_folder_that_someone_else_wrote(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-5"
    path.mkdir()
    write(path)
    assert checkpoints.latest(tmp_path) is None
    checkpoints.seal(path)
    assert checkpoints.latest(tmp_path) == path
    (path / "model.bin").write_bytes(b"newer")
    checkpoints.seal(path)
    assert checkpoints.problem(path) is None


def test_drop_after(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, write, keep=9)
    (tmp_path / ".writing-4").mkdir()
    checkpoints.drop_after(tmp_path, tmp_path / "checkpoint-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    checkpoints.drop_after(tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_step_of(tmp_path: Path) -> None:
    assert checkpoints.step_of(tmp_path / "checkpoint-12") == 12
    with pytest.raises(ValueError, match="checkpoint-<step>"):
        checkpoints.step_of(tmp_path / "checkpoint-x")
