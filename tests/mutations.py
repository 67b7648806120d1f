"""Breaks the PPO engine in many small ways, one at a time, in a copy of the code, and sees that a test notices.

    python tests/mutations.py            # all, a few seconds each
    python tests/mutations.py 7 31-35    # some, by their numbers

The list is in ``mutations_of_ppo.py``. The exit status is 1 if a mutation survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutations_of_ppo import MUTATIONS, Mutation

ROOT = Path(__file__).parent.parent
TESTS = "tests/rlhf/ppo/"


def chosen(arguments: list[str]) -> list[int]:
    """Numbers of mutations from ``7`` and ``31-35``; all of them without any."""
    numbers: list[int] = []
    for argument in arguments:
        first, _, last = argument.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers or list(range(1, len(MUTATIONS) + 1))


def survives(mutation: Mutation, copy: Path) -> bool:
    """Whether the tests pass although the code is broken."""
    path = copy / "rlhf" / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.file} has {text.count(mutation.old)} times: {mutation.old!r}")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        files, _, selection = mutation.tests.partition(" -k ")
        arguments = [TESTS + name for name in files.split()] + (["-k", selection.strip("'")] if selection else [])
        found = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(text, encoding="utf-8")
    if found.returncode not in (0, 1):  # 1: a test failed
        raise SystemExit(f"pytest {' '.join(arguments)} ended with {found.returncode}:\n{found.stdout[-2000:]}")
    return found.returncode == 0


def main() -> None:
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        for name in ("rlhf", "tasks", "flows", "data", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for number in chosen(sys.argv[1:]):
            mutation = MUTATIONS[number - 1]
            alive = survives(mutation, copy)
            survivors += alive
            verdict = "SURVIVES" if alive else "noticed"
            print(f"{number:3} point {mutation.point:8} {verdict:9} {mutation.what}", flush=True)
    raise SystemExit(1 if survivors else 0)


if __name__ == "__main__":
    main()
