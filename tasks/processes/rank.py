"""What each process of a distributed stage runs: the stage, in a context that says which process it is.

    python -m tasks.processes.rank <folder>

A ``Spec`` in the folder says what to do. Process 0 keeps the stage's journal, tells the pipeline of its entries
through a named pipe, and leaves the stage's metrics. A process that fails leaves its error, as JSON.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from rlhf.config import PipelineConfig
from rlhf.context import Context
from rlhf.errors import ConfigError
from rlhf.stages import STAGES
from rlhf.tracking import Entry, JournalTracker, Listener, NullTracker, Progress
from rlhf.training import computing, processes
from tasks.processes.lifetime import end_with
from tasks.processes.messages import EVENTS, FAILURE, LAUNCHER, METRICS, SPEC, Failure, Spec, encode
from tasks.processes.stopping import STOP_SECONDS, gently


def run(place: Path) -> None:
    """Run the stage in this process.

    Raises:
        ConfigError: there are not as many processes as there should be.
        Exception: what the stage raises.
    """
    spec = Spec(**json.loads((place / SPEC).read_text(encoding="utf-8")))
    if processes.count() != spec.processes:
        raise ConfigError(
            f"resources.processes is {spec.processes}, but accelerate started {processes.count()}; "
            "look at resources.accelerate_config"
        )
    first = processes.index() == 0
    config = PipelineConfig.model_validate(spec.config)
    os.environ["ACCELERATE_MIXED_PRECISION"] = computing.mixed_precision(config.resources)
    context = Context(
        stage=spec.stage,
        config=config,
        inputs={stage: Path(path) for stage, path in spec.inputs.items()},
        out=Path(spec.out),
        checkpoints=Path(spec.checkpoints),
        tracker=JournalTracker(Path(spec.journal), _teller(place / EVENTS)) if first else NullTracker(),
    )
    with gently(context.stop):
        metrics = importlib.import_module(STAGES[spec.stage].module).run(context)
    if first:
        (place / METRICS).write_text(json.dumps(metrics), encoding="utf-8")


def main(place: Path) -> int:
    """Run the stage; the exit code."""
    # By a signal that nobody can catch: a reward function may have changed what the others do.
    end_with(int(os.environ[LAUNCHER]), signal.SIGKILL)
    _end_after_sigterm(STOP_SECONDS)
    for stream in (sys.stdout, sys.stderr):  # whole lines: the ranks share one pipe
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)
    rank = processes.index()
    logging.basicConfig(format=f"[rank {rank}] %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("rlhf").setLevel(logging.INFO)
    try:
        run(place)
    except BaseException as error:
        failure = Failure(rank, time.time(), type(error).__name__, str(error), traceback.format_exc())
        temporary = place / f".{rank}"
        temporary.write_text(json.dumps(failure._asdict()), encoding="utf-8")
        temporary.rename(place / FAILURE.format(rank))
        return 1
    return 0


def _end_after_sigterm(seconds: float) -> None:
    """See that this process is gone so many seconds after SIGTERM.

    One that waits for the gradients of a process that has failed runs no Python, and no handler of a signal either.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.detach())

    def watch() -> None:
        while signal.SIGTERM not in heard.recv(1):
            pass
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _teller(pipe: Path) -> Listener:
    """A listener that writes what it hears into a named pipe."""
    file = pipe.open("w", encoding="utf-8")

    def tell(event: Entry | Progress) -> None:
        file.write(encode(event))
        file.flush()

    return tell


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: nothing is left to do, and the end of a process group may wait for ever for its others
