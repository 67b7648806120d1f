"""``rlhf`` as processes of their own that need not import torch and its like first, which takes 10 s of CPU each time.

They are forked from one process (this file as a program) that has imported what the stages import. Nothing of this
project stays imported there, nor Prefect, which reads its settings then: each takes both from its own place and
environment, ends as any program does, and can be stopped and killed. What is about imports wants a fresh interpreter.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OURS = ("flows", "tasks", "rlhf")
MOST_BYTES = 1 << 20  # of a request


class Forked:
    """A process: what tests use of ``subprocess.Popen``."""

    def __init__(self, parent: Parent, request: Mapping[str, Any]) -> None:
        self._output = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        reader, writer = os.pipe()
        parent.ask(request, [file.fileno() for file in self._output] + [writer])
        os.close(writer)
        self._said = os.fdopen(reader)
        self.pid = int(self._said.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or minus the signal, once it has ended."""
        if self.returncode is None and select.select([self._said], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """The same, when it has ended."""
        if self.returncode is None:
            self.returncode = int(self._said.readline())
            self._said.close()
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """What it has written, when it has ended."""
        self.wait()
        texts = []
        for file in self._output:
            with file:
                file.seek(0)
                texts.append(file.read())
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Parent:
    """The process that they are forked from; it ends with this one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.flows.forking", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, env={**environment, "PYTHONPATH": str(ROOT)}, cwd=ROOT, pass_fds=[theirs.fileno()]
            )
        atexit.register(self._stop)

    def ask(self, request: Mapping[str, Any], descriptors: list[int]) -> None:
        socket.send_fds(self._channel, [json.dumps(request).encode()], descriptors)

    def _stop(self) -> None:
        self._channel.close()
        self._process.wait()


@functools.cache
def _parent() -> Parent:
    return Parent({name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")})


def start(arguments: tuple[str, ...], environment: Mapping[str, str], folder: Path, code: Path = ROOT) -> Forked:
    """Start ``rlhf`` with these arguments, all of this environment, in a folder, from the packages in another one."""
    request = {"arguments": arguments, "environment": dict(environment), "folder": str(folder), "code": str(code)}
    return Forked(_parent(), request)


# ------------------------------------------------------------------------------------------ the program that is forked
def _prepare() -> None:
    """Import all that a run may need, and forget what is this project's."""
    from rlhf.stages import STAGES

    for name in (*(stage.module for stage in STAGES.values()), "rlhf.report.page", "matplotlib.backends.backend_agg"):
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1  # a fork would have none of the others


def _serve(channel: socket.socket) -> dict[str, Any]:
    """Fork for each request; return in the processes that are to be ``rlhf``, with what was asked."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that nobody has to wait for those who wait
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, MOST_BYTES, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            channel.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            out, error, said = descriptors
            if (child := os.fork()) == 0:
                os.dup2(out, 1)
                os.dup2(error, 2)
                for descriptor in descriptors:
                    os.close(descriptor)
                request: dict[str, Any] = json.loads(message)
                return request
            os.write(said, b"%d\n" % child)
            _, status = os.waitpid(child, 0)
            os.write(said, b"%d\n" % os.waitstatus_to_exitcode(status))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


if __name__ == "__main__":
    _prepare()
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    importlib.import_module("numpy").random.seed()  # it was drawn once, for all
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.path[:2] = [asked["folder"], asked["code"]]
    sys.argv = ["rlhf", *asked["arguments"]]
    runpy.run_module("flows.commands.cli", run_name="__main__", alter_sys=True)
