"""Which flow runs live on this machine: each holds a lock in the home folder, which ends with its process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf.store import is_locked, lock, unlock

NEW_SECONDS = 5.0  # a lock of this age is held by now, if its process lives
LIFE = "flow-run-"  # of the names of the locks


@contextmanager
def flow_run_alive(home: Path) -> Iterator[None]:
    """Say on this machine that the process of the present flow run lives, as long as it does."""
    from prefect import runtime

    path = _life(home, str(runtime.flow_run.id))
    descriptor = lock(path)
    assert descriptor is not None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        unlock(descriptor)


def flow_run_lives(home: Path, flow_run: str) -> bool:
    """Whether a process of this machine carries a flow run."""
    return is_locked(_life(home, flow_run))


def flow_run_was_here(home: Path, flow_run: str) -> bool:
    """Whether one did, and did not come to its end."""
    return _life(home, flow_run).exists()


def dead_flow_runs(home: Path) -> list[str]:
    """Flow runs that a process of this machine carried until it was killed, a few seconds ago or more."""
    found = []
    for path in (home / "locks").glob(f"{LIFE}*.lock"):
        with suppress(FileNotFoundError):  # it has just ended
            if time.time() - path.stat().st_mtime > NEW_SECONDS and not is_locked(path):
                found.append(path.stem.removeprefix(LIFE))
    return found


def forget_flow_run(home: Path, flow_run: str) -> None:
    """Take away what a dead process left of a flow run."""
    _life(home, flow_run).unlink(missing_ok=True)


def _life(home: Path, flow_run: str) -> Path:
    return home / "locks" / f"{LIFE}{flow_run}.lock"
