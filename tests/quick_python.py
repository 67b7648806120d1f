"""A Python that starts at once: each program is forked from a process that has imported the heavy libraries.

To import torch, transformers, accelerate, datasets and trl takes seconds, which tests of what a program computes would
pay each time. ``executable()`` is a command in place of ``sys.executable`` for ``<file> ...`` and ``-m <module> ...``.
It stands for its program: environment, folder and streams are those that it is given, signals and exit status pass
through, and if it is killed, so is the program. Of our own code nothing is imported before the fork.

Programs forked from one process have one seed of hashes: where that could matter, or where it is the start that is
tested, start a real Python.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any, NoReturn

FIRST = (
    *("torch", "torch.distributed.run", "numpy", "pandas", "pyarrow.parquet", "datasets", "safetensors.torch"),
    *("accelerate", "accelerate.commands.launch", "peft", "transformers", "transformers.trainer", "trl"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama", "t5")),
    *("trl.trainer.sft_trainer", "trl.trainer.reward_trainer", "pydantic", "yaml", "fsspec", "rich.console"),
    *("scipy.special", "nltk", "sacrebleu", "rouge_score.rouge_scorer", "matplotlib.backends.backend_agg"),
)
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP)
_started: list[str] = []


def executable() -> str:
    """The command; the process that forks ends with this one."""
    if _started:
        return _started[0]
    import atexit
    import shlex
    import shutil
    import subprocess
    import tempfile
    from pathlib import Path

    folder = Path(tempfile.mkdtemp(prefix="rlhf-python-"))
    address, command = folder / "socket", folder / "python"
    command.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", __file__, "run", str(address)])} "$@"\n')
    command.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener:  # whoever connects before the libraries are there waits for them
        listener.bind(str(address))
        listener.listen(64)
        path = os.pathsep.join(entry for entry in sys.path if entry)
        server = subprocess.Popen(
            [sys.executable, "-u", __file__, "serve", str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def stop() -> None:
        assert server.stdin is not None
        server.stdin.close()  # also happens if this process is killed
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:  # a fork of this process holds it open
            server.kill()
            server.wait()
        shutil.rmtree(folder)

    atexit.register(stop)
    _started.append(str(command))
    return _started[0]


# -------------------------------------------------------------------------------------------- what stands for a program
def run(address: str, arguments: list[str]) -> NoReturn:
    """Have a program forked, and end as it does."""
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody is left to wait for the program
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "parent": parent}
    message = json.dumps(request).encode()
    socket.send_fds(server, [len(message).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(message)

    def pass_on(number: int, frame: object) -> None:
        with suppress(OSError):  # the program has just ended
            server.sendall(bytes([number]))

    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    answer = server.recv(2)
    if not answer:
        os.write(2, b"quick_python: the process that forks has ended\n")
        os._exit(1)
    status = int.from_bytes(answer, "big", signed=True)
    if status < 0:
        if -status in PASSED_ON:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# -------------------------------------------------------------------------------------------------- the one that forks
class Request:
    """A program that is to run, as ``run`` describes it."""

    def __init__(self, connection: socket.socket) -> None:
        size, self.streams, _, _ = socket.recv_fds(connection, 4, 3)
        with connection.makefile("rb") as file:
            content = file.read(int.from_bytes(size, "big"))
        self.whole = 0 < len(content) == int.from_bytes(size, "big")  # else who asked has been killed
        self._values: dict[str, Any] = json.loads(content) if self.whole else {}

    def become(self) -> NoReturn:
        """Run the program in this process, which has just been forked."""
        import random
        import runpy
        import traceback

        import numpy as np

        for to, stream in enumerate(self.streams):
            os.dup2(stream, to)
            os.close(stream)
        os.chdir(self._values["folder"])
        os.environ.clear()
        os.environ.update(self._values["environment"])
        # The parent is that of what stands for this program, and ends when that parent does. Forks have their own.
        program, real = os.getpid(), os.getppid
        os.getppid = lambda: self._values["parent"] if os.getpid() == program else real()
        random.seed()  # a new interpreter draws these seeds, torch's is a constant
        np.random.seed()
        code: object = 0
        try:
            first, *rest = (word for word in self._values["arguments"] if word != "-u")
            path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
            path += [entry for entry in sys.path[1:] if entry not in path]
            if first == "-m":
                sys.argv, sys.path[:] = rest, path
                runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
            else:
                sys.argv, sys.path[:] = [first, *rest], [os.path.dirname(os.path.abspath(first)), *path]
                runpy.run_path(first, run_name="__main__")
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
            code = 1
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code or 0))  # type: ignore[call-overload]


def serve(listener: socket.socket) -> None:
    """Fork programs until nobody holds the other end of the standard input any more."""
    import gc
    import importlib
    import selectors

    for name in FIRST:
        importlib.import_module(name)
    gc.freeze()  # the collector would copy the pages of what all programs share
    ended, wake = socket.socketpair()
    for end in (ended, wake):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake.fileno())
    programs: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    for source in (sys.stdin, listener, ended):
        selector.register(source, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                signal.set_wakeup_fd(-1)
                for pid in programs:
                    os.kill(pid, signal.SIGKILL)
                return
            if key.fileobj is listener:
                connection, _ = listener.accept()
                request = Request(connection)
                pid = os.fork() if request.whole else None
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    selector.close()
                    for other in (listener, ended, wake, connection, *programs.values()):
                        other.close()
                    os.setsid()
                    request.become()
                for stream in request.streams:
                    os.close(stream)
                if pid:
                    programs[pid] = connection
                    selector.register(connection, selectors.EVENT_READ, pid)
            elif key.fileobj is ended:
                ended.recv(1 << 10)
                _tell_of_ends(programs, selector)
            elif key.data in programs:  # what stands for this program passes a signal on, or has ended
                passed = programs[key.data].recv(1 << 10)
                for number in passed or [signal.SIGKILL]:  # nobody can pass SIGSTOP on, so SIGTSTP means it
                    os.kill(key.data, signal.SIGSTOP if number == signal.SIGTSTP else number)
                if not passed:
                    selector.unregister(key.fileobj)


def _tell_of_ends(programs: dict[int, socket.socket], selector: Any) -> None:
    """Tell those that stand for programs which have ended how these have."""
    while programs:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        connection = programs.pop(pid)
        with suppress(KeyError):
            selector.unregister(connection)
        with suppress(BrokenPipeError), connection:
            connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(2, "big", signed=True))


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(sys.argv[2], sys.argv[3:])
    serve(socket.socket(fileno=int(sys.argv[2])))
