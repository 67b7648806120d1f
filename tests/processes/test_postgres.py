"""``rlhf up`` with Prefect and MLflow on one PostgreSQL database, and its backup by the commands of the docs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.team.up import _mlflow_database
from rlhf.errors import ConfigError
from tests.team.conftest import Up, started
from tests.team.postgres import BIN, Postgres, needs_postgres, postgres
from tests.team.test_up import SMOKE, STAGES, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_postgres]

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


@dataclass
class Made:
    """What a run has left behind: a database that is still there, a home folder, what Prefect knew and showed of it."""

    server: Postgres
    home: Path
    known: set[tuple[str, str]]
    stages: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Of a run that an ``rlhf up`` has carried, which has ended."""
    home = tmp_path_factory.mktemp("postgres") / "one"
    with postgres() as server:
        with started(home, "--database-url", f"{server.url}?sslmode=prefer") as up:
            run = up.submit("preset/run", **SMOKE)
            assert up.finish(run) == "COMPLETED"
            found = Made(server, home, known(up), up.artifacts(run)["stages"])
        yield found


def commands() -> list[list[str]]:
    """The two blocks of commands of the section, for making and for restoring a backup."""
    section = re.search(r"^## Backup and restore\n(.*?)^## ", DOCS.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert section is not None
    blocks = re.findall(r"(?:^    .+\n)+", section[1], re.MULTILINE)
    return [[line.strip() for line in block.splitlines()] for block in blocks]


def carry_out(block: list[str], folder: Path, home: Path, database: str) -> None:
    paths = os.pathsep.join([str(Path(sys.executable).parent), str(BIN), os.environ["PATH"]])
    environment = {**os.environ, "PATH": paths, "HOME_FOLDER": str(home), "DATABASE": database}
    for command in block:
        done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def known(up: Up) -> set[tuple[str, str]]:
    """The runs that Prefect knows, with their states."""
    return {(row["id"], row["state_type"]) for row in up.api("POST", "flow_runs/filter", limit=200)}


def test_a_run(made: Made) -> None:
    assert "/#/experiments/" in made.stages  # it is in MLflow
    assert not list(made.home.glob("**/*.db"))


def test_what_is_restored_elsewhere_goes_on(made: Made, tmp_path: Path) -> None:
    """By the very commands of docs/operations.md."""
    backup, restore = commands()
    carry_out(backup, tmp_path, made.home, made.server.url)
    place = tmp_path / "another" / "place"
    with postgres() as server:
        carry_out(restore, tmp_path, place, server.url)
        with started(place, "--database-url", server.url) as up:
            assert made.known <= known(up)
            again = up.submit("preset/run", **SMOKE)
            assert up.finish(again) == "COMPLETED"
            table = rows(up.artifacts(again)["stages"])
            assert {stage: row[1] for stage, row in table.items()} == dict.fromkeys(STAGES, "cached")
            assert "/#/experiments/" in up.artifacts(again)["stages"]


def test_a_user_that_may_make_nothing() -> None:
    with postgres() as server:
        subprocess.run(["psql", server.url, "-q", "-c", "CREATE ROLE reader LOGIN"], check=True)
        with pytest.raises(ConfigError, match="refuses: permission denied for database rlhf"):
            _mlflow_database(server.url.removeprefix("postgresql://").replace("rlhf@", "reader@"))
