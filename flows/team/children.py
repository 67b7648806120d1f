"""Long-running programs of ours: each in a session of its own, with a log file, and never left behind.

The kernel ends a child when this process goes, however it goes. Ctrl-C in the terminal is ours alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from tasks.processes.lifetime import end_with

BACKOFF_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)  # before a child that has died is started again


class Child:
    """A program that is to be there until ``stop``; ``revive`` starts it again when it has died.

    ``before_revival`` is called then, when all that the dead one had started is gone. If it raises, the program is not
    started, and the next ``revive`` tries again.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self.before_revival: Callable[[], None] = lambda: None
        self._command = list(command)
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths: list[float] = []
        self._next_start = 0.0

    def start(self) -> None:
        """Start it; its output is added to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                env={**os.environ, **self._environment},
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=partial(end_with, os.getpid()),
            )

    @property
    def pid(self) -> int | None:
        """Its process id; None when it has not been started."""
        return self._process.pid if self._process else None

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.poll() if self._process else None

    def revive(self) -> str | None:
        """Start it again if it has died, after a while that grows with every death; the news for a person, if any."""
        if self.exit_code is None:
            return None
        now = time.monotonic()
        if not self._next_start:
            self._deaths = [death for death in self._deaths if now - death < 600] + [now]
            wait = BACKOFF_SECONDS[min(len(self._deaths), len(BACKOFF_SECONDS)) - 1]
            self._next_start = now + wait
            return (
                f"{self.name} ended with exit code {self.exit_code}; it is started again in {wait:.0f} s ({self.log})"
            )
        if now >= self._next_start:
            self._end_session()
            self.before_revival()
            self._next_start = 0.0
            self.start()
        return None

    def stop(self, timeout: float = 15.0) -> None:
        """End it and all that it started: asked to first, made to after ``timeout`` seconds."""
        if self._process is None:
            return
        try:
            tree = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            tree = []
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(tree, timeout=timeout)
        for process in alive:
            process.kill()
        self._process.wait()
        self._end_session()

    def _end_session(self) -> None:
        """End what a program that has ended left in its session: a server's own processes keep its port."""
        assert self._process is not None
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self._process.pid:
                    process.kill()
