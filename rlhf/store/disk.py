"""Room on the disk: looked for before hours of training need it, and named when it has gone."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import StorageError

CHECKPOINTS = 3  # at once: two that are kept, and the one being written
MOMENTS_BYTES = 8  # two numbers of AdamW for each one that learns
FULL_BYTES = 2**20  # with less than this, what fails to be written fails for want of room


def training_bytes(checkpoint: int, learning: int, result: int) -> int:
    """What a training writes.

    Args:
        checkpoint: bytes of the weights in a checkpoint.
        learning: how many numbers the optimizer changes.
        result: bytes of the models that it leaves.
    """
    return CHECKPOINTS * (checkpoint + learning * MOMENTS_BYTES) + result


def check_room(folder: Path, wanted: int, what: str) -> None:
    """See that there is room for what is to be written below a folder, which may be yet to be made.

    Args:
        wanted: bytes, those included that lie there already from an earlier attempt.
        what: what needs them, as the beginning of the error.

    Raises:
        StorageError: there is not.
    """
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if wanted - there > free:
        raise StorageError(
            f"{what} needs {size(wanted - there)} ({wanted - there} bytes) in {folder}, where only {size(free)} are "
            "free; make room (`rlhf cache gc`), or take another disk (--home, RLHF_HOME)"
        )


@contextmanager
def named_if_full(folder: Path) -> Iterator[None]:
    """Call a full disk by its name: libraries say it in many ways, and some say something else.

    Raises:
        StorageError: in place of an error within the block that came of the disk of ``folder`` being full.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        free = shutil.disk_usage(folder).free if folder.exists() else FULL_BYTES
        if free >= FULL_BYTES and not _says_full(error):
            raise
        raise StorageError(
            f"the disk of {folder} is full ({size(free)} are free): {error}. Checkpoints and artifacts that were whole "
            "are kept; make room (`rlhf cache gc`) and run it again"
        ) from error


def _says_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, is the operating system's."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def size(count: int) -> str:
    """Bytes as ``1.2 MB``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.95:  # more is written as 1000.0
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
