"""Ships a run's journal to MLflow while the run goes on, in a process of its own.

A process, not a thread: importing MLflow (2 s), making requests and copying models would take turns with the training
loop for the interpreter's lock; a training that is killed with -9 is still reported to MLflow; and nothing that
MLflow does can take the training down. The process is told the run's directory in a line of its standard input, reads
the journal there, and is told nothing else, except the end: its input closes when its owner closes it, or dies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tasks.mlflow.journal import end_if_abandoned
from tasks.mlflow.server import brief, load, without_password
from tasks.mlflow.sync import BusyError, Replay, Shipped, pending_one_by_one

log = logging.getLogger("tasks.mlflow.shipper")  # not __name__: this module also runs as a program

POLL_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 5.0  # between two attempts while the server is away
PATIENCE_SECONDS = 15.0  # with a server that is away, once the run is over
CLOSE_SECONDS = 60.0  # for the rest, at the end of a run
CANCELLED_SECONDS = 3.0  # at the end of one that is to be gone within 15; what is left goes with the next run
SHIPPER_LOG = "shipper.log"


class Shipper:
    """Ships the journal of a run in the background, and what earlier runs beside it have left.

    It is made before the run is: importing MLflow takes time, in which the run can be planned.

    Args:
        tracking_uri: of MLflow. Credentials belong into the environment (``MLFLOW_TRACKING_USERNAME`` ...).

    The server going away and coming back is logged once each, to this process's log. Everything else that the
    process has to say is in ``shipper.log`` in the run's directory.
    """

    def __init__(self, tracking_uri: str) -> None:
        self._uri = tracking_uri
        self._directory: Path | None = None
        self._complete: bool | None = None
        self._process = self._spawn()

    def follow(self, directory: Path) -> Self:
        """Ship the journal of this run, which is open, from now on."""
        self._directory = directory.resolve()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended already: closing sees that, and starts another
                self._process.stdin.write(f"{self._directory}\n")
                self._process.stdin.flush()
        return self

    def close(self, timeout: float = CLOSE_SECONDS) -> bool:
        """Ship what is left, waiting for that up to ``timeout`` seconds; call it after the journal was closed.

        Once it has returned, calling it again does nothing.

        Returns:
            Whether everything is in MLflow now. If not, the next run does it.
        """
        if self._complete is None:
            self._complete = self._finish(timeout) if self._directory else self._abandon()
        return self._complete

    def _abandon(self) -> bool:
        """End the process, which has no run to ship."""
        self._process.terminate()
        self._close_input()
        self._process.wait()
        return True

    def _finish(self, timeout: float) -> bool:
        assert self._directory is not None
        deadline = time.monotonic() + timeout
        if self._process.poll() not in (None, 0):  # it was killed, or crashed: one more attempt
            self._close_input()
            self._process = self._spawn()
            self.follow(self._directory)
        self._close_input()
        try:
            if self._process.wait(max(0.0, deadline - time.monotonic())) == 0:
                return True
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
            if Shipped.read(self._directory).complete:  # it was shipping what earlier runs have left
                return True
        log.warning("MLflow has not got everything of the run %s yet; it is kept for later", self._directory.name)
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        cancelled = kind is not None and not issubclass(kind, Exception)
        self.close(CANCELLED_SECONDS if cancelled else CLOSE_SECONDS)

    def _close_input(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _spawn(self) -> subprocess.Popen[str]:
        packages = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-m", "tasks.mlflow.shipper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # until there is a run, with a log
            text=True,
            # The URI is not an argument: those can be seen by every user of the machine.
            env={**os.environ, "PYTHONPATH": path, "MLFLOW_TRACKING_URI": self._uri},
            start_new_session=True,  # Ctrl-C in the terminal is for the training; this one then ships its end
        )
        assert process.stdout is not None
        threading.Thread(target=_relay, args=(process.stdout,), name="shipper-log", daemon=True).start()
        return process


def follow(directory: Path, tracking_uri: str, wait: Callable[[float], bool]) -> bool:
    """Ship a journal until its run has ended, or ``wait`` says that no more is to come and all is shipped.

    Args:
        directory: of the run.
        tracking_uri: of MLflow.
        wait: waits up to the given seconds; whether the owner has closed the shipper, or died.

    Returns:
        Whether everything is shipped.
    """
    closing, failures, stuck, deadline = False, 0, 0, float("inf")
    pending = pending_one_by_one(directory.parent, tracking_uri)
    with Replay(directory, tracking_uri) as replay:
        while True:
            abandoned = end_if_abandoned(directory)
            try:
                state = replay.run()
            except Exception as error:
                if failures == 0:
                    where = without_password(tracking_uri)
                    log.warning("MLflow at %s cannot be written to; metrics are kept here: %s", where, brief(error))
                failures += 1
                if abandoned or closing:
                    deadline = min(deadline, time.monotonic() + PATIENCE_SECONDS)
                    if time.monotonic() >= deadline:
                        return False
            else:
                if failures > 0:
                    log.info("MLflow at %s is back; it has all metrics now", without_password(tracking_uri))
                failures = 0
                stuck = stuck + 1 if state.waiting else 0  # files that cannot be sent now are not sent every second
                next(pending, None)  # of what earlier runs have left, one at a time: this run goes first
                if state.complete or closing:
                    return not state.waiting
            pause = min(LONGEST_WAIT_SECONDS, POLL_SECONDS * 2 ** min(max(failures, stuck), 8)) * random.uniform(0.5, 1)
            if closing:
                time.sleep(pause)
            else:
                closing = wait(pause)


def main(tracking_uri: str) -> int:
    """The program: exit code 0 when everything was shipped, 1 when not, 3 when another process is at it."""
    with contextlib.suppress(Exception):  # what is wrong with it is said when it is used, and there is a log
        load()
    os.nice(10)  # the training goes first
    line = sys.stdin.readline()
    if not line:
        return 0
    directory = Path(line.removesuffix("\n"))
    errors = os.open(directory / SHIPPER_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(errors, sys.stderr.fileno())
    os.close(errors)
    logging.raiseExceptions = False  # the training process that reads this may be dead
    handler = logging.StreamHandler(sys.stdout)
    sys.stdout = sys.stderr  # what else is printed is for shipper.log
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.getLogger("tasks").addHandler(handler)
    logging.getLogger("tasks").setLevel(logging.INFO)
    try:
        return 0 if follow(directory, tracking_uri, _wait_for_owner) else 1
    except BusyError as error:
        log.warning("%s", error)
        return 3


def _wait_for_owner(seconds: float) -> bool:
    """Wait, but not beyond the end of the standard input; whether that has come."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def _relay(lines: IO[str]) -> None:
    """Repeat what the process logs in the log of this one."""
    with lines:
        for line in lines:
            level, _, message = line.rstrip("\n").partition(" ")
            log.log(logging.getLevelNamesMapping().get(level, logging.WARNING), "%s", message)


if __name__ == "__main__":
    code = main(os.environ["MLFLOW_TRACKING_URI"])
    logging.shutdown()
    os._exit(code)  # a run waits for this process, and to take MLflow's modules down takes half a second
