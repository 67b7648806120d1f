"""A Prefect API for a run on this machine, where no server is configured.

Prefect would start a temporary server itself, but leave it behind when the run is killed. This one dies with the
run, and starts while torch is still being imported. Its database (``<home>/prefect``) keeps the history of runs.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_SECONDS = 120.0
_PR_SET_PDEATHSIG = 1


def configure(home: Path) -> None:
    """Set Prefect's environment before it is imported; what the user has set stays."""
    os.environ.setdefault("PREFECT_HOME", str(home / "prefect"))
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # Errors reach the user once, from the command line; Prefect's console would add a traceback to each.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")


@contextmanager
def prefect_api(home: Path) -> Iterator[str]:
    """The URL of a Prefect API: the configured one, or a server of this run's own that ends with it.

    Raises:
        RuntimeError: the server ended, or did not answer in time.
    """
    configured = os.environ.get("PREFECT_API_URL")
    if configured:
        yield configured
        return
    port = _free_port()
    log = home / "prefect" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        server = subprocess.Popen(
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
            preexec_fn=_die_with_parent,
        )
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    try:
        yield os.environ["PREFECT_API_URL"]
    finally:
        del os.environ["PREFECT_API_URL"]
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_until_healthy(url: str, home: Path) -> None:
    """Return when the API answers.

    Raises:
        RuntimeError: it did not within ``START_TIMEOUT_SECONDS``; the message names its log.
    """
    import time

    import httpx

    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    why = ""
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.HTTPError as error:
            why = f"{type(error).__name__}: {error}"
        time.sleep(0.05)
    raise RuntimeError(f"Prefect's API at {url} does not answer ({why}); see {home / 'prefect' / 'server.log'}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _die_with_parent() -> None:
    """Runs in the child: ask the kernel to end it when the parent goes, however it goes; leave Ctrl-C to the parent."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
