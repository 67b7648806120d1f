"""Locks exclude, and end with their holder."""

import subprocess
import sys
import time
from pathlib import Path

from rlhf.store.locks import is_locked, lock, locked, try_lock, unlock

HOLD = """
import sys, time
from pathlib import Path
from rlhf.store.locks import lock
lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_excludes_also_within_one_process(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with locked(path):
        assert is_locked(path)
        assert try_lock(path) is None
        assert lock(path, timeout=0.1) is None
    assert not is_locked(path)


def test_is_locked_of_a_lock_nobody_ever_took(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "never.lock")
    assert not (tmp_path / "never.lock").exists()


def test_a_killed_holder_frees_the_lock_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert try_lock(path) is None
    holder.kill()
    killed = time.monotonic()
    descriptor = lock(path, timeout=10)
    assert descriptor is not None
    assert time.monotonic() - killed < 5
    unlock(descriptor)
    holder.communicate()
