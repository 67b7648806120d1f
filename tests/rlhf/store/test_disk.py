"""Room on the disk: refused before the training, and named when it goes within it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.errors import StorageError
from rlhf.sft import stage as sft
from rlhf.store import disk
from rlhf.training import computing


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the disk has left, in bytes."""

    def set_free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": count}))

    return set_free


def test_what_lies_there_already_is_not_wanted_again(tmp_path: Path, free: Any) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model").write_bytes(b"x" * 600)
    free(400)
    disk.check_room(tmp_path, 1000, "sft")
    disk.check_room(tmp_path / "new" / "folder", 400, "sft")
    with pytest.raises(StorageError, match=rf"sft needs 401 B \(401 bytes\) in {tmp_path}, where only 400 B are free"):
        disk.check_room(tmp_path, 1001, "sft")


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_training_asks_for_as_much_as_it_writes(
    lora_rank: int, toy: Any, free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tensors; the headers of files and what a Trainer notes of itself are little."""
    asked: list[int] = []
    monkeypatch.setattr(disk, "check_room", lambda folder, wanted, what: asked.append(wanted))
    context = toy.context("sft", sft={"max_steps": 6, "checkpoint_every": 2}, model={"lora_rank": lora_rank})
    sft.run(context)
    kept = [*context.checkpoints.glob("checkpoint-*/*.safetensors"), *context.checkpoints.glob("*/optimizer.pt")]
    assert len(kept) == 4  # of two checkpoints
    in_checkpoints = sum(map(tensor_bytes, kept)) // 2 * disk.CHECKPOINTS
    assert asked[0] == pytest.approx(in_checkpoints + tensor_bytes(context.out / "model/model.safetensors"), rel=0.1)


def tensor_bytes(path: Path) -> int:
    if path.suffix == ".safetensors":
        return computing.bytes_of(load_file(path).values())
    moments = torch.load(path, weights_only=True)["state"].values()
    return computing.bytes_of(tensor for one in moments for tensor in one.values() if tensor.ndim)


def test_a_training_without_room_does_not_begin(toy: Any, free: Any) -> None:
    free(10_000)
    context = toy.context("sft")
    with pytest.raises(StorageError, match="sft, with its checkpoints, needs"):
        sft.run(context)
    assert not toy.curves() if toy.journal().exists() else True
    assert not list(context.checkpoints.iterdir())


def test_bytes_of() -> None:
    assert computing.bytes_of([torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)]) == 16


@pytest.mark.parametrize(
    ("error", "left", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 10**9, True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), 10**9, True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), 1000, True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), 10**9, False),
        (OSError(errno.EACCES, "Permission denied"), 10**9, False),
        (ValueError("no such word"), 10**9, False),
    ],
)
def test_a_full_disk_has_one_name(error: Exception, left: int, named: bool, tmp_path: Path, free: Any) -> None:
    free(left)
    with pytest.raises(StorageError if named else type(error)) as raised, disk.named_if_full(tmp_path):
        raise error
    assert (str(tmp_path) in str(raised.value)) == named
    assert str(error) in str(raised.value)


def test_an_error_before_there_is_a_folder_is_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="not yours"), disk.named_if_full(tmp_path / "home"):
        raise PermissionError("not yours")


def test_an_error_that_came_of_a_full_disk(tmp_path: Path, free: Any) -> None:
    free(10**9)
    with pytest.raises(StorageError), disk.named_if_full(tmp_path):  # noqa: PT012
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise ValueError("the checkpoint cannot be written") from error
