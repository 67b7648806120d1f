"""A Prefect API for a run on this machine, where no server is configured.

Prefect would start a temporary server itself, but leave it behind when the run is killed. This one dies with the
run, and starts while torch is still being imported. Its database (``<home>/prefect``) keeps the history of runs.
"""

import atexit
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from flows.team.heartbeats import ENVIRONMENT
from rlhf.store import lock, unlock
from tasks.prefect.server import PRIVATE
from tasks.processes.lifetime import end_with

START_TIMEOUT_SECONDS = 120.0


def configure(home: Path) -> None:
    """Set Prefect's environment before it is imported; what the user has set stays."""
    os.environ.setdefault("PREFECT_HOME", str(home / "prefect"))
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Errors reach the user once, from the command line; Prefect's console would add a traceback to each.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")


def connect(home: Path) -> "Server | None":
    """Set ``PREFECT_API_URL`` to a server of this process's own, unless one is configured already.

    Call it before Prefect is imported: what Prefect sends at its exit must still find the server, and exit functions
    run in the reverse order of their registration.
    """
    if "PREFECT_API_URL" in os.environ:
        return None
    server = Server(home)
    atexit.register(server.stop)
    os.environ |= {"PREFECT_API_URL": server.url, PRIVATE: "1"}
    return server


class Server:
    """Prefect's API, without its UI and scheduler, on a port of the loopback; it ends with this process.

    Servers on one home folder start one after the other, since the first has to make the database.
    """

    def __init__(self, home: Path, port: int | None = None) -> None:
        self.log = home / "prefect" / "server.log"
        self._lock = lock(home / "prefect" / "start.lock")
        port = port or free_port()
        self.url = f"http://127.0.0.1:{port}/api"
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"),
                    *("--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on"),
                ],
                env={
                    **os.environ,
                    "PREFECT_UI_ENABLED": "0",
                    "PREFECT__SERVER_EPHEMERAL": "1",
                    "PREFECT__SERVER_FINAL": "1",
                    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
                },
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the run's to handle
                preexec_fn=partial(end_with, os.getpid()),
            )

    def wait(self) -> None:
        """Return when the API answers.

        Raises:
            RuntimeError: the server ended, or did not answer within ``START_TIMEOUT_SECONDS``.
        """
        import httpx

        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        why = ""
        try:
            # One client: it reads all certificates first, which would take the server's time again and again.
            with httpx.Client(timeout=5) as client:
                while time.monotonic() < deadline and self._process.poll() is None:
                    try:
                        if client.get(f"{self.url}/health").is_success:
                            return
                    except httpx.HTTPError as error:
                        why = f"{type(error).__name__}: {error}"
                    time.sleep(0.05)
            if self._process.poll() is not None:
                why = f"it ended with exit code {self._process.returncode}"
            raise RuntimeError(f"Prefect's API at {self.url} does not answer ({why}); see {self.log}")
        finally:
            if self._lock is not None:
                unlock(self._lock)
                self._lock = None

    def stop(self) -> None:
        """End the server."""
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    """A port of the loopback that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
