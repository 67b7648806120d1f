"""Runs a stage in several processes, under ``accelerate launch``, and sees that none of them is left behind.

The pipeline starts ``tasks.processes.launcher``, which starts the ranks (``tasks.processes.rank``). What
they print goes to the log of the Prefect run. Each of the three ends when the one above it does, however that ended
(``tasks.processes.lifetime``).
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import psutil

from rlhf import errors
from rlhf.config import Resources
from rlhf.context import Context
from rlhf.errors import ConfigError, RlhfError
from rlhf.tracking import Listener
from tasks.processes.messages import EVENTS, EXIT_CODES, FAILURE, METRICS, SPEC, Failure, Spec, decode

log = logging.getLogger(__name__)

GRACE_SECONDS = 15.0  # from SIGTERM to SIGKILL, and for what is still in the pipes of processes that have ended
LAST_LINES = 30  # of the output, with an error that no process has explained

# accelerate would take what is in the user's own default file for granted.
PLAIN = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": False, "debug": False}


def is_wanted(resources: Resources) -> bool:
    """Whether stages that can do so run under ``accelerate launch``."""
    return resources.processes > 1 or resources.accelerate_config is not None


def run(context: Context, journal: Path, listener: Listener) -> dict[str, float]:
    """Run a stage in ``resources.processes`` processes; what it returns in the first one.

    Args:
        context: as the stage is given it, but for the tracker: that of the first process writes to ``journal``.
        listener: hears what the tracker tells, once and in order.

    Raises:
        ConfigError: there are fewer GPUs than processes.
        RlhfError: a process raised it; the class is the same, the message names the process.
        RuntimeError: a process failed otherwise, or was killed; the message says which one, and how.
    """
    resources, logger = context.config.resources, _logger()
    _check_devices(resources)
    with tempfile.TemporaryDirectory(prefix="rlhf-processes-") as name:
        place = Path(name)
        _write_spec(place, context, journal)
        os.mkfifo(place / EVENTS)
        tail: deque[str] = deque(maxlen=LAST_LINES)

        def print_line(line: bytes) -> None:
            tail.append(line.decode(errors="replace").rstrip())
            logger.info("%s", tail[-1])

        process = subprocess.Popen(
            _command(resources, place),
            env=_environment(resources),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is the pipeline's to handle
        )
        _follow(process, place / EVENTS, print_line, _guarded(listener))
        if process.returncode:
            raise _error(context.config.resources, context.stage, place, process.returncode, tail, logger)
        metrics: dict[str, float] = json.loads((place / METRICS).read_text(encoding="utf-8"))
        return metrics


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a launcher and all that it has started: with SIGTERM, which it passes on, and soon with SIGKILL."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    finally:
        process.kill()
        for other in tree:
            with suppress(psutil.NoSuchProcess):
                other.kill()
        process.wait()
        psutil.wait_procs(tree, GRACE_SECONDS)


# ------------------------------------------------------------------------------------------------- starting the ranks
def _check_devices(resources: Resources) -> None:
    import torch  # not at the top: a run of which all is cached does without

    if _on_cpu(resources):
        return
    if (found := torch.cuda.device_count()) < resources.processes:
        raise ConfigError(
            f"resources.processes is {resources.processes}, but torch sees {found} CUDA device(s), one of which each "
            "process needs; lower it, or set resources.device: cpu"
        )


def _on_cpu(resources: Resources) -> bool:
    import torch

    return resources.device == "cpu" or (resources.device == "auto" and not torch.cuda.is_available())


def _threads(resources: Resources) -> int:
    """CPU threads of each process."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, (resources.threads or int(os.environ.get("OMP_NUM_THREADS") or cores)) // resources.processes)


def _write_spec(place: Path, context: Context, journal: Path) -> None:
    resources = context.config.resources
    config = context.config.model_copy(
        update={"resources": resources.model_copy(update={"threads": _threads(resources)})}
    )
    spec = Spec(
        processes=resources.processes,
        stage=context.stage,
        config=config.model_dump(mode="json"),
        inputs={stage: str(path.resolve()) for stage, path in context.inputs.items()},
        out=str(context.out.resolve()),
        checkpoints=str(context.checkpoints.resolve()),
        journal=str(journal.resolve()),
    )
    (place / SPEC).write_text(json.dumps(spec._asdict()), encoding="utf-8")


def _command(resources: Resources, place: Path) -> list[str]:
    file = resources.accelerate_config
    if file is None:
        file = str(place / "accelerate.json")  # JSON is YAML too
        Path(file).write_text(json.dumps(PLAIN | {"num_processes": resources.processes}), encoding="utf-8")
    options: dict[str, object] = {
        "config_file": file,
        "num_processes": resources.processes,
        "num_machines": 1,
        "main_process_port": 0,  # one that is free
        "num_cpu_threads_per_process": _threads(resources),
        "gradient_accumulation_steps": 1,  # the stages accumulate themselves
        "mixed_precision": "no",  # the stages take resources.precision
    }
    return [
        *(sys.executable, "-m", "tasks.processes.launcher", str(os.getpid()), str(place)),
        *(f"--{name}={value}" for name, value in options.items()),
        *(["--multi_gpu"] if resources.processes > 1 else []),  # torch's agent; without a GPU, too
        *("--module", "tasks.processes.rank", str(place)),
    ]


def _environment(resources: Resources) -> dict[str, str]:
    """That of this process, in which Python finds the same modules in the same order."""
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONSAFEPATH": "1",  # not those of the working folder first
        "PYTHONUNBUFFERED": "1",
    }
    if _on_cpu(resources):
        found["ACCELERATE_USE_CPU"] = "true"
        if sys.platform == "linux":
            found.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all of them are on this machine
    return found


# ------------------------------------------------------------------------------------------------ following the ranks
def _logger() -> logging.Logger | logging.LoggerAdapter[Any]:
    """The log of the Prefect run; outside of one, that of this module."""
    from prefect.exceptions import MissingContextError
    from prefect.logging import get_run_logger

    try:
        return get_run_logger()
    except MissingContextError:
        return log


def _guarded(listener: Listener) -> Callable[[bytes], None]:
    """Passes lines of events on; as with a tracker of this process, a listener that fails does not end a training."""
    ears: list[Listener] = [listener]

    def hear(line: bytes) -> None:
        for ear in list(ears):
            try:
                ear(decode(line))
            except Exception:
                log.exception("the listener of a stage failed; training goes on and logs to its file alone")
                ears.clear()

    return hear


class _Stream(NamedTuple):
    """A pipe that is read line by line."""

    descriptor: int
    take: Callable[[bytes], None]
    rest: bytearray

    def read(self) -> bool:
        """Pass on the lines that are there now; false at the end."""
        content = os.read(self.descriptor, 1 << 16)
        *lines, last = bytes(self.rest + content).split(b"\n")
        self.rest[:] = last
        for line in lines:
            self.take(line)
        if not content and self.rest:
            self.take(bytes(self.rest))
        return bool(content)


def _follow(
    process: subprocess.Popen[bytes], events: Path, print_line: Callable[[bytes], None], hear: Callable[[bytes], None]
) -> None:
    """Pass on what the processes say until the launcher and all that hold its output have ended.

    An exception, such as a cancellation, ends them; they are heard until then, since one whose output is closed would
    fail in the step that it is to end.
    """
    output: IO[bytes] | None = process.stdout
    assert output is not None
    pipe = os.open(events, os.O_RDONLY | os.O_NONBLOCK)  # now, so that rank 0 can open it for writing
    try:
        with output, selectors.DefaultSelector() as selector:
            for descriptor, take in ((output.fileno(), print_line), (pipe, hear)):
                selector.register(descriptor, selectors.EVENT_READ, _Stream(descriptor, take, bytearray()))
            try:
                _read_to_end(process, selector, output.fileno())
            except BaseException:  # Ctrl-C, too
                read = partial(copy_context().run, _read_to_end, process, selector, output.fileno())
                reader = threading.Thread(target=read, daemon=True)
                reader.start()
                stop(process)
                reader.join(GRACE_SECONDS + 1.0)
                raise
            process.wait()
            if pipe in selector.get_map():
                with suppress(BlockingIOError):
                    while selector.get_key(pipe).data.read():
                        pass
    finally:
        os.close(pipe)


def _read_to_end(process: subprocess.Popen[bytes], selector: selectors.BaseSelector, output: int) -> None:
    """Pass on what comes until the output ends, or soon after the launcher if someone else holds it open."""
    deadline = None
    while output in selector.get_map():
        for key, _ in selector.select(timeout=0.5):
            if not key.data.read():
                selector.unregister(key.fileobj)
        if process.poll() is not None:
            deadline = deadline or time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline:
                return


# ------------------------------------------------------------------------------------------------------------- errors
def _error(
    resources: Resources, stage: str, place: Path, code: int, tail: deque[str], logger: Any
) -> RlhfError | RuntimeError:
    """The error of the process that failed first: the others fail because of it, or are ended.

    First come errors that a process raised on purpose, then processes that were killed, then any other exception.
    """
    count = resources.processes
    failures = [Failure(**json.loads(path.read_text("utf-8"))) for path in sorted(place.glob(FAILURE.format("*")))]
    failures.sort(key=lambda failure: failure.when)
    codes: dict[str, int] = {}
    if (place / EXIT_CODES).exists():
        codes = json.loads((place / EXIT_CODES).read_text(encoding="utf-8"))
    for failure in failures:
        kind = getattr(errors, failure.kind, None)
        if isinstance(kind, type) and issubclass(kind, RlhfError):
            logger.error("rank %d of %d failed\n%s", failure.rank, count, failure.traceback)
            return kind(f"{failure.message} (rank {failure.rank} of {count})")
    explained = {failure.rank for failure in failures}
    unexplained = {int(rank): code for rank, code in codes.items() if int(rank) not in explained}
    if unexplained:
        rank, code = min(unexplained.items(), key=lambda item: item[1])
        found = RuntimeError(f"{stage}: rank {rank} of {count} {_ended(code)}")
        found.add_note("The last lines that the processes printed:\n" + "\n".join(tail))
    elif failures:
        first = failures[0]
        found = RuntimeError(f"{stage}: rank {first.rank} of {count} failed: {first.kind}: {first.message}")
        found.add_note(first.traceback)
    else:
        last = f": {tail[-1]}" if code > 0 and tail else ""
        found = RuntimeError(f"{stage}: the launcher of its {count} process(es) {_ended(code)}{last}")
        found.add_note("The last lines that it printed:\n" + "\n".join(tail))
    logger.error("%s\n%s", found, "\n".join(found.__notes__))
    return found


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    why = "; did the machine run out of memory?" if name == "SIGKILL" else ""
    return f"was killed by signal {-code} ({name}){why}"
