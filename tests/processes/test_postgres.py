"""``rlhf up`` with Prefect and MLflow on one PostgreSQL database."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flows.team.up import _mlflow_database
from rlhf.errors import ConfigError
from tests.team.conftest import started
from tests.team.postgres import needs_postgres, postgres

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), needs_postgres]


def test_a_run(tmp_path: Path) -> None:
    with postgres() as server, started(tmp_path / "home", "--database-url", f"{server.url}?sslmode=prefer") as up:
        run = up.submit("preset/run", preset="demo", size="smoke", overrides=["resources.threads=1"])
        assert up.finish(run) == "COMPLETED"
        assert "/#/experiments/" in up.artifacts(run)["stages"]  # it is in MLflow
    assert not list((tmp_path / "home").glob("**/*.db"))


def test_a_user_that_may_make_nothing() -> None:
    with postgres() as server:
        subprocess.run(["psql", server.url, "-q", "-c", "CREATE ROLE reader LOGIN"], check=True)
        with pytest.raises(ConfigError, match="refuses: permission denied for database rlhf"):
            _mlflow_database(server.url.removeprefix("postgresql://").replace("rlhf@", "reader@"))
