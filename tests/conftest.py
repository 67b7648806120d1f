"""Shared by all tests: no network, no state outside the test's folder, one Prefect API per test process."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from flows.team.server import Server, configure, free_port
from rlhf.context import Context
from rlhf.errors import DataError
from rlhf.stages import STAGES
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


def pytest_collection_finish() -> None:
    """What has been imported stays; garbage collection, which each training asks for, need not look at it each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """File by file: what is cheap; what has asked for more time than others; what else is slow.

    A process that is alone with a long test in the end would take that much longer than the others.
    """
    slow, longest = ({item.path for item in items if item.get_closest_marker(mark)} for mark in ("slow", "timeout"))
    items.sort(key=lambda item: 1 if item.path in longest else 2 if item.path in slow else 0)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a home folder of its own, and no shared store."""
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLHF_STORE", "")


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes that run tests."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def prefect_api(common: Path) -> str:
    """A Prefect API of this test process's own."""
    tables, database = common / "prefect.db", _STATE / "prefect" / "prefect.db"
    if tables.exists():  # another process has made them
        database.parent.mkdir(exist_ok=True)
        shutil.copy(tables, database)
    server = Server(_STATE, _PORT)
    atexit_after_prefect.append(server.stop)
    server.wait()
    if not tables.exists():
        part = tables.with_suffix(f".{os.getpid()}")
        with closing(sqlite3.connect(database)) as made, closing(sqlite3.connect(part)) as copy:
            made.backup(copy)
        part.rename(tables)
    return server.url


@pytest.fixture(scope="session")
def prefect_tables(prefect_api: str, common: Path) -> Path:
    """The SQLite file of a Prefect server at its first start, to be copied: making its tables takes 5 s of CPU."""
    return common / "prefect.db"


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file of MLflow with nothing in it, to be copied: making its tables takes 2 s of CPU."""
    from tasks.mlflow.server import connect, default_uri

    home = tmp_path_factory.mktemp("mlflow")
    connect(default_uri(home))
    return home / "mlflow.db"


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


# A pipeline of stand-in stages: what flows, tasks, cache and tracking do does not depend on what a stage computes.
PARTS = {
    "prepare": ("demonstrations", "preferences", "prompts", "base"),
    "sft": ("model",),
    "judge": ("preferences",),
    "reward": ("model", "scores.parquet"),
    "ppo": ("model", "curves.parquet"),
    "evaluate": ("report.json",),
}


class Calls(list[str]):
    """The stages that were computed, in order; ``fail`` names one that raises, ``change`` alters what one gives."""

    fail: str = ""
    change: str = ""


@contextmanager
def standing_in() -> Iterator[Calls]:
    """Replace every stage by one that copies its settings into its output, and record which of them ran."""
    calls = Calls()

    def stand_in(name: str) -> Callable[[Context], dict[str, float]]:
        def run(context: Context) -> dict[str, float]:
            calls.append(name)
            for step in (1, 2, 3):
                context.tracker.log({f"{name}/loss": 1.0 / step}, step)
                context.tracker.progress(step, 3, loss=1.0 / step)
            if calls.fail == name:
                raise DataError(f"{name} was told to fail")
            settings = context.config.model_dump_json(include={name}) if name != "prepare" else ""
            for part in PARTS[name]:
                (context.out / part).write_text(settings + (calls.change if name == "sft" else ""))
            return {f"{name}/result": 1.0}

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name, stage in STAGES.items():
            module = types.ModuleType(f"stand_in_{name}")
            module.run = stand_in(name)  # type: ignore[attr-defined]
            patch.setitem(sys.modules, module.__name__, module)
            patch.setitem(STAGES, name, stage._replace(module=module.__name__))
        yield calls


@pytest.fixture
def calls() -> Iterator[Calls]:
    """Stand-in stages, and which of them were computed."""
    with standing_in() as calls:
        yield calls


@pytest.fixture(scope="session")
def stood_in(tmp_path_factory: pytest.TempPathFactory, prefect_api: str) -> Path:
    """The home folder in which a pipeline of stand-ins has run once; nothing of it went to MLflow."""
    from flows.commands.cli import main

    home = tmp_path_factory.mktemp("stood-in") / "home"
    with standing_in() as calls, pytest.MonkeyPatch.context() as patch:
        for name, value in (("RLHF_HOME", str(home)), ("RLHF_STORE", "")):
            patch.setenv(name, value)
        assert main(["run", "--set", "tracking.enabled=false"]) == 0
        assert calls == list(STAGES)
    return home


@pytest.fixture
def run_once(stood_in: Path, home: Path, calls: Calls) -> Path:
    """A copy of it, for a test that goes on from there."""
    return shutil.copytree(stood_in, home)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The home folder of the test."""
    return tmp_path / "home"
