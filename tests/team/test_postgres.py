"""``rlhf up`` with Prefect and MLflow on one PostgreSQL database."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.team.conftest import started
from tests.team.postgres import needs_postgres, postgres

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), needs_postgres]


def test_a_run(tmp_path: Path) -> None:
    with postgres() as server, started(tmp_path / "home", "--database-url", server.url) as up:
        run = up.submit("preset/run", preset="demo", size="smoke", overrides=["resources.threads=1"])
        assert up.finish(run) == "COMPLETED"
        assert "/#/experiments/" in up.artifacts(run)["stages"]  # it is in MLflow
    assert not list((tmp_path / "home").glob("**/*.db"))
