"""Shared by all tests: no network, no state outside the test's folder, one Prefect API per test process."""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.team.server import Server, configure, free_port
from tasks.prefect.server import PRIVATE

# Prefect reads its settings when it is first imported, so the environment is set before any test module is.
_STATE = Path(tempfile.mkdtemp(prefix="rlhf-tests-"))
_PORT = free_port()
os.environ.update(
    HF_HUB_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true", MPLBACKEND="Agg", PREFECT_HOME=str(_STATE / "prefect")
)
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ |= {"PREFECT_API_URL": f"http://127.0.0.1:{_PORT}/api", PRIVATE: "1"}
configure(_STATE)

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would what they start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Exit functions run in reverse order: this one, registered before Prefect is imported, after Prefect's own.
atexit_after_prefect: list[Callable[[], None]] = []
atexit.register(lambda: [function() for function in atexit_after_prefect])

# Prefect sets up logging when it is imported, and closes the handlers that are there. absl's (it comes with
# rouge_score) closes its stream with it, which is pytest's, if a test module has imported that before.
importlib.import_module("prefect.main")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test comes first, or one process would be alone with it in the end."""
    items.sort(key=lambda item: "test_large.py" not in item.nodeid)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a home folder of its own, and no shared store."""
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLHF_STORE", "")


@pytest.fixture(scope="session")
def prefect_api() -> str:
    """A Prefect API of this test process's own."""
    server = Server(_STATE, _PORT)
    atexit_after_prefect.append(server.stop)
    server.wait()
    return server.url


@pytest.fixture
def offline_rlhf(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process, for verbs that need no Prefect: exit code, standard output, standard error."""
    from flows.commands.cli import main

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def rlhf(prefect_api: str, offline_rlhf: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """The same for all verbs."""
    return offline_rlhf
