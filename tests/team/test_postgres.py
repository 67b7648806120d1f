"""``rlhf up`` with Prefect and MLflow on one PostgreSQL database."""

from __future__ import annotations

import os
import pwd
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.server import free_port
from tests.team.conftest import started

BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(BIN is None, reason="needs PostgreSQL, Debian's package postgresql"),
]


@pytest.fixture
def database() -> Iterator[str]:
    """The address of an empty database on a server of the test's own, which runs as a user that is not root."""
    user = {"user": "postgres"} if os.getuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="rlhf-postgres-") as name:
        folder, port = Path(name), free_port()
        if user:
            os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)

        def run(program: str, *arguments: str) -> None:
            subprocess.run([BIN / program, *arguments], check=True, cwd=folder, stdout=subprocess.DEVNULL, **user)

        run("initdb", "-D", str(folder / "data"), "-A", "trust", "-U", "rlhf")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        run("pg_ctl", "-D", str(folder / "data"), "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "rlhf", "rlhf")
            yield f"postgresql://rlhf@127.0.0.1:{port}/rlhf"
        finally:
            run("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "stop")


def test_a_run(database: str, tmp_path: Path) -> None:
    with started(tmp_path / "home", "--database-url", database) as up:
        run = up.submit("preset/run", preset="demo", size="smoke", overrides=["resources.threads=1"])
        assert up.finish(run) == "COMPLETED"
        assert "/#/experiments/" in up.artifacts(run)["stages"]  # it is in MLflow
    assert not list((tmp_path / "home").glob("**/*.db"))
