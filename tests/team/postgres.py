"""A PostgreSQL server of the test's own, which runs as a user that is not root."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from flows.team.server import free_port

BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
needs_postgres = pytest.mark.skipif(BIN is None, reason="needs PostgreSQL, Debian's package postgresql")


class Postgres:
    """A server on a folder; ``url`` is the address of an empty database on it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self._user = {"user": "postgres"} if os.getuid() == 0 else {}
        if self._user:
            os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)
        self.url = f"postgresql://rlhf@127.0.0.1:{self._port}/rlhf"
        self._run("initdb", "-D", str(folder / "data"), "-A", "trust", "-U", "rlhf")
        self.start()
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self._port), "-U", "rlhf", "rlhf")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        folder = self._folder
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        self._run("pg_ctl", "-D", str(folder / "data"), "-o", options, "-l", str(folder / "log"), "-w", "start")

    def kill(self) -> None:
        """End the server as ``kill -9`` does; its other processes notice."""
        os.kill(int((self._folder / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)

    def stop(self) -> None:
        """End it at once."""
        self._run("pg_ctl", "-D", str(self._folder / "data"), "-m", "immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        assert BIN is not None
        command = [BIN / program, *arguments]
        subprocess.run(command, check=True, cwd=self._folder, stdout=subprocess.DEVNULL, **self._user)


@contextmanager
def postgres() -> Iterator[Postgres]:
    """One that ends with the block."""
    with TemporaryDirectory(prefix="rlhf-postgres-") as name:
        server = Postgres(Path(name))
        try:
            yield server
        finally:
            server.stop()
