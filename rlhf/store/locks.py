"""Locks between processes that no crash can leave behind.

``flock`` locks belong to an open file and are released by the kernel when its process ends, however it ends: a
waiting process goes on at once after a ``kill -9`` of the holder.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.05


def try_lock(path: Path) -> int | None:
    """Lock ``path`` (made if missing) without waiting; the file descriptor that holds it, or None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def lock(path: Path, timeout: float | None = None) -> int | None:
    """Lock ``path``, waiting up to ``timeout`` seconds (None: for ever); the file descriptor, or None."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while (descriptor := try_lock(path)) is None:
        if deadline is not None and time.monotonic() >= deadline:
            return None
        time.sleep(POLL_SECONDS)
    return descriptor


def unlock(descriptor: int) -> None:
    """Release a lock taken by :func:`lock` or :func:`try_lock`."""
    os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock now."""
    if not path.exists():
        return False
    descriptor = try_lock(path)
    if descriptor is None:
        return True
    unlock(descriptor)
    return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock for the length of a ``with`` block."""
    descriptor = lock(path)
    assert descriptor is not None
    try:
        yield
    finally:
        unlock(descriptor)
