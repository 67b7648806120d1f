"""Backup and restore, by the very commands of docs/operations.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.team.conftest import Up, started
from tests.team.postgres import BIN, needs_postgres, postgres
from tests.team.test_up import SMOKE, STAGES, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_postgres]

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


def commands() -> list[list[str]]:
    """The two blocks of commands of the section, for making and for restoring a backup."""
    section = re.search(r"^## Backup and restore\n(.*?)^## ", DOCS.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert section is not None
    blocks = re.findall(r"(?:^    .+\n)+", section[1], re.MULTILINE)
    return [[line.strip() for line in block.splitlines()] for block in blocks]


def run(block: list[str], folder: Path, home: Path, database: str) -> None:
    paths = os.pathsep.join([str(Path(sys.executable).parent), str(BIN), os.environ["PATH"]])
    environment = {**os.environ, "PATH": paths, "HOME_FOLDER": str(home), "DATABASE": database}
    for command in block:
        done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def known(up: Up) -> set[tuple[str, str]]:
    """The runs that Prefect knows, with their states."""
    return {(row["id"], row["state_type"]) for row in up.api("POST", "flow_runs/filter", limit=200)}


def test_what_is_restored_elsewhere_goes_on(tmp_path: Path) -> None:
    backup, restore = commands()
    with postgres() as server:
        with started(tmp_path / "one", "--database-url", server.url) as up:
            assert up.finish(up.submit("preset/run", **SMOKE)) == "COMPLETED"
            before = known(up)
        run(backup, tmp_path, tmp_path / "one", server.url)
    with postgres() as server:
        run(restore, tmp_path, tmp_path / "another" / "place", server.url)
        with started(tmp_path / "another" / "place", "--database-url", server.url) as up:
            assert before <= known(up)
            again = up.submit("preset/run", **SMOKE)
            assert up.finish(again) == "COMPLETED"
            table = rows(up.artifacts(again)["stages"])
            assert {stage: row[1] for stage, row in table.items()} == dict.fromkeys(STAGES, "cached")
            assert "/#/experiments/" in up.artifacts(again)["stages"]
