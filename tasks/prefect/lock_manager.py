"""Prefect's lock manager on locks that the kernel releases.

Prefect's own file locks have no expiry: after a ``kill -9`` of the holder the next run waits for ever.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from prefect.locking.protocol import LockManager

from rlhf.store import is_locked, lock, unlock


class FlockLockManager(LockManager):
    """Locks ``<directory>/<key>.lock``; a key of ours is ``<stage>-<cache key>``.

    ``hold_timeout`` is not supported, and not used by Prefect's transactions: the lock ends with its holder.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._held: dict[str, tuple[str, int]] = {}  # key -> holder, file descriptor

    def acquire_lock(
        self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None
    ) -> bool:
        """Take the lock, waiting up to ``acquire_timeout`` seconds (None: for ever); whether it was taken."""
        if self.is_lock_holder(key, holder):
            return True
        descriptor = lock(self._path(key), acquire_timeout)
        if descriptor is None:
            return False
        self._held[key] = (holder, descriptor)
        return True

    async def aacquire_lock(
        self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None
    ) -> bool:
        """The same without blocking the event loop."""
        return await asyncio.to_thread(self.acquire_lock, key, holder, acquire_timeout, hold_timeout)

    def release_lock(self, key: str, holder: str) -> None:
        """Give the lock back.

        Raises:
            ValueError: ``holder`` does not hold it.
        """
        if not self.is_lock_holder(key, holder):
            raise ValueError(f"{holder!r} does not hold the lock {key!r}")
        unlock(self._held.pop(key)[1])

    def is_locked(self, key: str) -> bool:
        """Whether anyone holds the lock."""
        return key in self._held or is_locked(self._path(key))

    def is_lock_holder(self, key: str, holder: str) -> bool:
        """Whether this holder, in this process, holds the lock."""
        return key in self._held and self._held[key][0] == holder

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        """Wait until nobody holds the lock; whether that came within ``timeout`` seconds."""
        descriptor = lock(self._path(key), timeout)
        if descriptor is None:
            return False
        unlock(descriptor)
        return True

    async def await_for_lock(self, key: str, timeout: float | None = None) -> bool:
        """The same without blocking the event loop."""
        return await asyncio.to_thread(self.wait_for_lock, key, timeout)

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.lock"
