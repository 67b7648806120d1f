"""A Prefect API for a run on this machine, where no server is configured.

Prefect would start a temporary server itself, but leave it behind when the run is killed. This one dies with the
run, and starts while torch is still being imported. Its database (``<home>/prefect``) keeps the history of runs.
"""

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
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


def start_prefect_api(home: Path) -> str:
    """The URL of a Prefect API: the configured one, or that of a server of this process's own.

    Call it before Prefect is imported: what Prefect sends at its exit must still find the server, and exit functions
    run in the reverse order of their registration.
    """
    if "PREFECT_API_URL" in os.environ:
        return os.environ["PREFECT_API_URL"]
    port = free_port()
    atexit.register(_stop, spawn_server(home, port))
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    return os.environ["PREFECT_API_URL"]


def spawn_server(home: Path, port: int) -> subprocess.Popen[bytes]:
    """Start Prefect's API, without its UI and scheduler, on a port of the loopback; it ends with this process."""
    with _log(home).open("ab") as output:
        return subprocess.Popen(
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


def wait_until_healthy(url: str, home: Path) -> None:
    """Return when the API answers.

    Raises:
        RuntimeError: it did not within ``START_TIMEOUT_SECONDS``; the message names its log.
    """
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
    raise RuntimeError(f"Prefect's API at {url} does not answer ({why}); see {_log(home)}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(timeout=10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _log(home: Path) -> Path:
    path = home / "prefect" / "server.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def free_port() -> int:
    """A port of the loopback that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _die_with_parent() -> None:
    """Runs in the child: ask the kernel to end it when the parent goes, however it goes; leave Ctrl-C to the parent."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
