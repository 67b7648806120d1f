"""Shipping in the background: what is killed, or goes away and comes back, loses and doubles nothing."""

import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rlhf.tracking.tracker import JournalTracker
from tasks.mlflow import shipper
from tasks.mlflow.journal import PARENT, RunJournal
from tasks.mlflow.shipper import CANCELLED_SECONDS, CLOSE_SECONDS, Shipper
from tasks.mlflow.sync import Shipped, ship
from tasks.processes.stopping import STOP_SECONDS
from tests.tasks.mlflow_reads import history, runs_of

ROOT = Path(__file__).parents[3]


def begin(directory: Path) -> RunJournal:
    journal = RunJournal.open(directory)
    journal.start("demo", experiment="rlhf")
    return journal


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


# The process in the background


def test_the_shipper_ships_while_the_run_goes_on(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = begin(tmp_path / "live")
    shipper = Shipper(store).follow(tmp_path / "live")
    journal.start_stage("sft")
    journal.metrics("sft", {"sft/loss": 1.0}, 1)
    until(lambda: "sft" in Shipped.read(tmp_path / "live").runs)
    until(lambda: "sft/loss" in runs_of(store, "live")["sft"].data.metrics)
    journal.metrics("sft", {"sft/loss": 0.5}, 2)
    journal.end(PARENT)
    journal.close()
    assert shipper.close(timeout=60)
    assert caplog.text == ""  # it has nothing to say when all goes well
    assert history(store, runs_of(store, "live")["sft"], "sft/loss") == [(1, 1.0), (2, 0.5)]
    assert Shipped.read(tmp_path / "live").complete


def test_the_shipper_also_ships_what_an_earlier_run_has_left(store: str, tmp_path: Path) -> None:
    with begin(tmp_path / "left") as journal:
        journal.start_stage("sft")
        journal.metrics("sft", {"sft/loss": 1.0}, 1)
    with begin(tmp_path / "next"):
        shipper = Shipper(store).follow(tmp_path / "next")
    assert shipper.close(timeout=60)
    assert Shipped.read(tmp_path / "left").complete
    assert history(store, runs_of(store, "left")["sft"], "sft/loss") == [(1, 1.0)]


def test_without_a_run_the_shipper_ends_at_once(store: str) -> None:
    with pytest.raises(ValueError, match="refused"), Shipper(store) as shipper:
        raise ValueError("refused")
    assert shipper._process.poll() is not None


def test_the_shipper_of_an_owner_that_dies_before_its_run_begins_ends(store: str) -> None:
    code = (
        "import os, sys; from tasks.mlflow.shipper import Shipper\n"
        "print(Shipper(sys.argv[1])._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    said = subprocess.run([sys.executable, "-c", code, store], cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
    until(lambda: not psutil.pid_exists(int(said.stdout)))


def test_kill_9_of_the_training_is_reported_by_the_shipper(store: str, tmp_path: Path) -> None:
    directory = tmp_path / "dead"
    code = (
        "import os, sys; from pathlib import Path\n"
        "from tasks.mlflow.journal import RunJournal; from tasks.mlflow.shipper import Shipper\n"
        "directory = Path(sys.argv[1])\n"
        "journal = RunJournal.open(directory); journal.start('demo', experiment='rlhf'); journal.start_stage('sft')\n"
        "Shipper(sys.argv[2]).follow(directory)\n"
        "journal.metrics('sft', {'sft/loss': 1.0}, 1); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(directory), store], cwd=ROOT, check=False)
    until(lambda: Shipped.read(directory).complete)
    runs = runs_of(store, "dead")
    assert (runs[PARENT].info.status, runs["sft"].info.status) == ("KILLED", "KILLED")
    assert history(store, runs["sft"], "sft/loss") == [(1, 1.0)]


def test_kill_9_of_the_shipper_in_the_middle_loses_and_doubles_nothing(store: str, tmp_path: Path) -> None:
    directory = tmp_path / "killed"
    points = 2_500
    with begin(directory) as journal:
        journal.start_stage("sft")
        for step in range(points):
            journal.metrics("sft", {"sft/loss": float(step)}, step)
        shipper = Shipper(store).follow(directory)
        until(lambda: Shipped.read(directory).offset > 20_000)
        os.kill(shipper._process.pid, signal.SIGKILL)
        shipper._process.wait()
        offset = Shipped.read(directory).offset
        assert offset < (directory / "journal.jsonl").stat().st_size  # it was in the middle
    assert shipper.close(timeout=60)  # which starts another one
    for run in runs_of(store, "killed").values():
        assert history(store, run, "sft/loss") == [(step, float(step)) for step in range(points)]


# A server that goes away


@pytest.fixture
def server(tmp_path: Path, mlflow_tables: Path) -> Iterator["Server"]:
    server = Server(tmp_path / "server", mlflow_tables)
    server.start()
    yield server
    server.kill()


class Server:
    """A real ``mlflow server`` on a free port."""

    def __init__(self, folder: Path, tables: Path) -> None:
        folder.mkdir()
        shutil.copy(tables, folder / "mlflow.db")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "server.log").open("ab") as output:
            self._process = subprocess.Popen(
                command, env=environment, cwd=self._folder, stdout=output, stderr=output, start_new_session=True
            )
        until(self._answers)

    def kill(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def test_a_server_killed_and_restarted_gets_every_point_once_and_never_blocks(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="tasks.mlflow.shipper")
    directory = tmp_path / "runs" / "http"
    slowest, step = 0.0, 0
    with begin(directory) as journal:
        journal.start_stage("sft")
        journal.text("sft", "notes/a.txt", "hello")
        shipper = Shipper(server.uri).follow(directory)
        tracker = JournalTracker(tmp_path / "metrics.jsonl", journal.listener("sft"))

        def train(condition: Callable[[], bool]) -> None:
            nonlocal slowest, step
            deadline = time.monotonic() + 60
            while not condition():
                assert time.monotonic() < deadline, caplog.text
                started = time.perf_counter()
                tracker.log({"sft/loss": float(step), "sft/nan": math.nan}, step)
                slowest = max(slowest, time.perf_counter() - started)
                step += 1
                time.sleep(0.005)

        train(lambda: Shipped.read(directory).offset > 20_000)
        server.kill()
        train(lambda: "cannot be written to" in caplog.text)
        server.start()
        train(lambda: "is back" in caplog.text)
        back_at = step
        train(lambda: step > back_at + 100)
    assert shipper.close(timeout=60), (directory / "shipper.log").read_text()
    assert slowest < 1.0
    assert caplog.text.count("cannot be written to") == 1
    runs = runs_of(server.uri, "http")
    for run in runs.values():
        assert history(server.uri, run, "sft/loss") == [(i, float(i)) for i in range(step)]
        assert len(history(server.uri, run, "sft/nan")) == step
        assert run.info.status == "FINISHED"
    file = MlflowClient(server.uri).download_artifacts(runs["sft"].info.run_id, "notes/a.txt", str(tmp_path))
    assert Path(file).read_text() == "hello"


def test_without_a_server_the_run_ends_in_time_and_is_kept_for_later(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    with begin(tmp_path / "offline") as journal:
        shipper = Shipper(uri).follow(tmp_path / "offline")
        until(lambda: "cannot be written to" in caplog.text)
        journal.tags(PARENT, {"late": "yes"})
    started = time.monotonic()
    assert not shipper.close(timeout=1.0)
    assert not shipper.close(timeout=60)  # nothing happens, as it is closed
    assert time.monotonic() - started < 5
    assert ship(tmp_path / "offline", store).complete
    assert runs_of(store, "offline")[PARENT].data.tags["late"] == "yes"


@pytest.mark.parametrize(
    ("error", "seconds"),
    [(None, CLOSE_SECONDS), (ValueError(), CLOSE_SECONDS), (KeyboardInterrupt(), CANCELLED_SECONDS)],
    ids=repr,
)
def test_a_run_that_is_cancelled_waits_less(
    error: BaseException | None, seconds: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(Shipper, "_spawn", lambda self: None)
    monkeypatch.setattr(Shipper, "close", lambda self, timeout: waited.append(timeout))
    with pytest.raises(type(error)) if error else nullcontext(), Shipper("sqlite://"):
        if error:
            raise error
    assert waited == [seconds]
    assert CANCELLED_SECONDS + STOP_SECONDS < 15.0  # in which it is to be gone


# Waiting, in numbers


@pytest.mark.parametrize("trouble", ["no answer", "a file that cannot be sent"])
def test_attempts_grow_rarer_and_are_not_regular(trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn:
        def __init__(self, directory: Path, tracking_uri: str) -> None: ...
        def __enter__(self) -> "Stubborn":
            return self

        def __exit__(self, *error: object) -> None: ...
        def run(self) -> Shipped:
            if trouble == "no answer":
                raise MlflowException("503 Service Unavailable")
            return Shipped(waiting=[0])

    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) == 20

    monkeypatch.setattr(shipper, "Replay", Stubborn)
    monkeypatch.setattr(shipper, "PATIENCE_SECONDS", 0.0)
    with begin(tmp_path / "run"):
        assert not shipper.follow(tmp_path / "run", "http://127.0.0.1:9", wait)
    most = [min(shipper.LONGEST_WAIT_SECONDS, shipper.POLL_SECONDS * 2**i) for i in range(1, 21)]
    assert all(limit / 2 <= seconds <= limit for seconds, limit in zip(waits, most, strict=True))
    assert len(set(waits)) == 20


@pytest.mark.parametrize("status", [500, 503, 0])
def test_an_answer_that_is_an_error_or_none_loses_nothing(
    status: int, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0: the connection ends without one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if status:
                self.send_error(status)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    name = f"answer-{status}"
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with begin(tmp_path / name) as journal:
            journal.start_stage("sft")
            journal.metrics("sft", {"sft/loss": 1.0}, 1)
        with pytest.raises(MlflowException):
            ship(tmp_path / name, f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    state = ship(tmp_path / name, store)
    assert (state.complete, state.skipped) == (True, 0)
    assert history(store, runs_of(store, name)["sft"], "sft/loss") == [(1, 1.0)]
