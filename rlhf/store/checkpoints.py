"""Checkpoints that can be trusted after a kill: one counts only when every file matches its ``manifest.json``.

The manifest is written last, so that a folder without one was being written when the process died. Everything in
it is hashed again before it is used: a training that resumes from a file that is missing or cut off goes on
without an error, on another path.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from rlhf.store.hashing import MANIFEST, files_of, manifest_of

log = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_WRITING = ".writing-"


def save(directory: Path, step: int, write: Callable[[Path], None], keep: int = 2) -> Path:
    """Write the checkpoint of a step: it is there whole and sealed, or not at all.

    Args:
        directory: where the checkpoints of one training are; made if need be.
        step: what the checkpoint is named by, and ordered.
        write: fills the empty directory that it is given.
        keep: how many checkpoints remain afterwards, this one included; at least 1.

    Returns:
        Its path, ``directory/checkpoint-<step>``. An earlier one of the same step is replaced.
    """
    temporary, target = directory / f"{_WRITING}{step}", directory / f"checkpoint-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    seal(temporary)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    _sync(directory)
    prune(directory, keep)
    return target


def seal(path: Path) -> None:
    """Add the manifest to a checkpoint that someone else wrote; only then does it count."""
    for file in files_of(path).values():  # the files must reach the disk before the manifest that vouches for them
        _sync(file)
    temporary = path / f"{MANIFEST}.tmp"
    temporary.unlink(missing_ok=True)
    manifest = json.dumps({"files": manifest_of(path)}, indent=1)
    temporary.write_text(manifest, encoding="utf-8")
    _sync(temporary)
    temporary.rename(path / MANIFEST)
    _sync(path)


def problem(path: Path) -> str | None:
    """Why a checkpoint does not count, in words; None when all of it matches its manifest."""
    try:
        expected = dict(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"])
    except FileNotFoundError:
        return f"it has no {MANIFEST}: its writing was interrupted"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    actual = manifest_of(path)
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not in its manifest"
        if actual[name] != expected[name]:
            return f"{name} has changed since it was written"
    return None


def latest(directory: Path) -> Path | None:
    """The newest checkpoint that verifies, or None. Newer ones that do not are passed over, with a warning."""
    for path in reversed(_all(directory)):
        reason = problem(path)
        if reason is None:
            return path
        log.warning("passing over checkpoint %s: %s", path, reason)
    return None


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named by.

    Raises:
        ValueError: the name is not ``checkpoint-<step>``.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name!r} is not the name of a checkpoint; expected checkpoint-<step>")
    return int(match.group(1))


def prune(directory: Path, keep: int = 2) -> None:
    """Delete all but the ``keep`` newest checkpoints, and what was left half written."""
    for path in [*directory.glob(f"{_WRITING}*"), *_all(directory)[:-keep]]:
        shutil.rmtree(path)


def drop_after(directory: Path, checkpoint: Path | None) -> None:
    """Delete everything newer than a checkpoint (everything, when it is None), so that a resumed run starts clean."""
    step = -1 if checkpoint is None else step_of(checkpoint)
    for path in [*directory.glob(f"{_WRITING}*"), *_all(directory)]:
        if path.name.startswith(_WRITING) or step_of(path) > step:
            shutil.rmtree(path)


def _all(directory: Path) -> list[Path]:
    """Every checkpoint folder, oldest first, whole or not."""
    return sorted((path for path in directory.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=step_of)


def _sync(path: Path) -> None:
    """Force a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
