"""What the pipeline and the processes of a distributed stage tell each other: JSON files in a folder, and a pipe."""

from __future__ import annotations

import json
from typing import NamedTuple

from rlhf.tracking import Entry, Progress

LAUNCHER = "RLHF_LAUNCHER"  # environment variable of the ranks: the launcher's process id

SPEC = "spec.json"  # a Spec, for all ranks
EVENTS = "events"  # a named pipe: what the tracker of rank 0 tells, a line each
METRICS = "metrics.json"  # what the stage returned in rank 0
FAILURE = "failure-{}.json"  # a Failure, of the rank of that number
EXIT_CODES = "exit_codes.json"  # of the ranks that had failed when the launcher saw it, by rank; below 0: a signal


class Spec(NamedTuple):
    """What the ranks are to do; paths as text, the configuration as JSON."""

    processes: int
    stage: str
    config: dict[str, object]
    inputs: dict[str, str]
    out: str
    checkpoints: str
    journal: str


class Failure(NamedTuple):
    """How a rank failed. ``kind`` is the name of the exception's class, ``when`` in seconds since 1970."""

    rank: int
    when: float
    kind: str
    message: str
    traceback: str


def encode(event: Entry | Progress) -> str:
    """An event as one line; NaN and infinities as Python writes and reads them."""
    return json.dumps([type(event).__name__, *event]) + "\n"


def decode(line: str | bytes) -> Entry | Progress:
    """The event that ``encode`` wrote."""
    kind, *values = json.loads(line)
    return Entry(*values) if kind == Entry.__name__ else Progress(*values)
