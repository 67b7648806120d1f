"""A whole ``rlhf up`` on free ports, with a client of its Prefect server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.team.server import free_port

SECONDS = 240.0  # for anything to happen that should, on a busy machine
TLS = httpx.create_ssl_context()  # made once: to read the certificates again takes longer than the request itself


@dataclass
class Up:
    """An ``rlhf up`` that is ready."""

    process: subprocess.Popen[str]
    home: Path
    prefect: str
    mlflow: str
    project: Path

    def api(self, method: str, path: str, **body: Any) -> Any:
        """What Prefect's API answers. While it is away or busy (503), come back, as Prefect's own clients do."""
        for pause in (0.2, 1.0, 5.0, 10.0, 30.0, None):
            try:
                answer = httpx.request(method, f"{self.prefect}/api/{path}", json=body or None, timeout=30, verify=TLS)
                if answer.status_code != 503 or pause is None:
                    break
            except httpx.TransportError:
                if pause is None:
                    raise
            time.sleep(pause)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def deployment(self, name: str) -> dict[str, Any]:
        """A deployment by ``flow/name``."""
        found: dict[str, Any] = self.api("GET", f"deployments/name/{name}")
        return found

    def submit(self, deployment: str, **parameters: Any) -> str:
        """Ask for a run; its id."""
        made = self.api(
            "POST",
            f"deployments/{self.deployment(deployment)['id']}/create_flow_run",
            parameters=parameters,
            state={"type": "SCHEDULED"},
        )
        return str(made["id"])

    def state(self, run: str) -> str:
        """The type of a run's state."""
        return str(self.api("GET", f"flow_runs/{run}")["state_type"])

    def finish(self, run: str) -> str:
        """The state that a run ends with."""
        wait_for(lambda: self.state(run) in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"), f"the end of run {run}")
        return self.state(run)

    def artifacts(self, run: str) -> dict[str, Any]:
        """The data of a run's artifacts, by key."""
        rows = self.api("POST", "artifacts/filter", artifacts={"flow_run_id": {"any_": [run]}})
        return {row["key"]: row["data"] for row in rows}

    def tree(self) -> list[psutil.Process]:
        """All its processes."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]


def wait_for(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """Return what the condition gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.3)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


def _said(home: Path) -> dict[str, Any]:
    """What the ``rlhf up`` that was ready last has written."""
    try:
        found: dict[str, Any] = json.loads((home / "up.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found


@contextmanager
def started(home: Path, *arguments: str) -> Iterator[Up]:
    """Run ``rlhf up`` on a home folder, from a folder ``project`` beside it, and end it as Ctrl-C does."""
    project = home.parent / "project"
    project.mkdir(parents=True, exist_ok=True)
    prefect, mlflow = free_port(), free_port()
    ours = ("PREFECT", "RLHF", "MLFLOW_TRACKING")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "flows.commands.cli", "up", "--home", str(home)),
            *("--prefect-port", str(prefect), "--mlflow-port", str(mlflow), *arguments),
        ],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: _said(home).get("pid") == process.pid or process.poll() is not None, "rlhf up")
        assert process.poll() is None, process.stdout and process.stdout.read()
        said = _said(home)
        yield Up(process, home, said["prefect"], said["mlflow"], project)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)
        if process.stdout:
            process.stdout.close()


@pytest.fixture(scope="package")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One that all tests of this folder share, or those of a process of xdist."""
    with started(tmp_path_factory.mktemp("team") / "home") as ready:
        yield ready
