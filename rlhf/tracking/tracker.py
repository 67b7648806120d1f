"""The curves of one stage, written to a journal file as they are made.

The journal, ``metrics.jsonl``, has one JSON object a line:
``{"t": <unix ms>, "step": 10, "values": {"sft/loss": 1.2}}``.
A value that JSON has no number for is a string: ``"nan"``, ``"inf"``, ``"-inf"``; ``float()`` reads both.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from rlhf.errors import ArtifactError

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """One point of each of several curves. ``t`` is in milliseconds since 1970, UTC."""

    t: int
    step: int
    values: dict[str, float]


class Progress(NamedTuple):
    """How far a stage is (``done`` of ``total`` steps), with numbers for a live display. It is not recorded."""

    done: int
    total: int
    live: dict[str, float]


Listener = Callable[[Entry | Progress], None]


class Tracker(Protocol):
    """Where a stage sends its numbers. Names carry the stage as prefix, as in ``"sft/loss"``."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to each curve, at once and on this machine: it never waits for a server."""

    def progress(self, done: int, total: int, **live: float) -> None:
        """Tell a live display how far the stage is. Not recorded."""

    def mark(self) -> int:
        """The present end of the journal, to be saved in a checkpoint."""

    def rewind(self, mark: int) -> None:
        """Drop what was logged after a mark, on resuming from its checkpoint, so that each point is there once."""


class NullTracker:
    """A tracker that keeps nothing: for tests, and for the processes of a distributed run that are not the first."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def progress(self, done: int, total: int, **live: float) -> None:
        """Do nothing."""

    def mark(self) -> int:
        """Always 0."""
        return 0

    def rewind(self, mark: int) -> None:
        """Do nothing."""


class JournalTracker:
    """A tracker that appends to a stage's ``metrics.jsonl``; one instance is one attempt at the stage.

    What an earlier, killed attempt left in the file stays only as far as this one rewinds to: a stage that resumes
    calls ``rewind(mark)``, one that starts from nothing does not and finds an empty journal. So a stage never has its
    points twice, and needs no code for the case that there was no checkpoint.

    ``listener`` sees every entry that counts, once and in order, those kept by the first rewind included, and every
    progress. It must not log itself. If it raises, the error is logged and training goes on without it.
    All methods may be called from any thread.
    """

    def __init__(self, path: Path, listener: Listener | None = None) -> None:
        self._path = path
        self._listener = listener
        self._lock = threading.Lock()
        self._begun = False
        self._told = 0  # bytes of the journal that the listener has seen

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Append one line. It survives a kill of the process as soon as this returns.

        Raises:
            OSError: the line cannot be written (the disk is full, say).
        """
        entry = Entry(time.time_ns() // 1_000_000, int(step), {name: float(value) for name, value in values.items()})
        line = _encode(entry)
        with self._lock:
            self._begin()
            # Opened anew for each line (about 30 microseconds): nothing to close, nothing shared with forked workers.
            with self._path.open("ab", buffering=0) as file:
                file.write(line)
                self._told = file.tell()
            self._tell(entry)

    def progress(self, done: int, total: int, **live: float) -> None:
        """Pass it on to the listener."""
        with self._lock:
            self._tell(Progress(done, total, live))

    def mark(self) -> int:
        """The journal's length in bytes, once they are on the disk: a checkpoint never outlives its curves."""
        with self._lock:
            self._begin()
            with self._path.open("ab") as file:
                os.fsync(file.fileno())
                return file.tell()

    def rewind(self, mark: int) -> None:
        """Cut the journal to ``mark`` bytes, and tell the listener of what is kept and new to it.

        A mark that this journal cannot have (it is beyond the end, or within a line) gets a warning and keeps the
        whole lines before it: curves with a gap are no reason to lose a training.
        """
        with self._lock:
            content = self._path.read_bytes()[:mark] if self._path.exists() else b""
            end = content.rfind(b"\n") + 1
            if end != mark:
                log.warning("%s has no mark at byte %d; its points up to byte %d are kept", self._path, mark, end)
            self._cut(end)
            for entry in _decode(content[self._told : end], self._path):
                self._tell(entry)
            self._told = end

    def _begin(self) -> None:
        """Before the first write of this attempt: without a rewind, nothing of an earlier one counts."""
        if not self._begun:
            self._cut(0)

    def _cut(self, size: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.truncate(size)
        self._begun = True

    def _tell(self, event: Entry | Progress) -> None:
        if self._listener is None:
            return
        try:
            self._listener(event)
        except Exception:
            log.exception("the listener of %s failed; training goes on and logs to that file alone", self._path)
            self._listener = None


def read_journal(path: Path) -> Iterator[Entry]:
    """The entries of a journal in their order. A last line that was cut off by a kill is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: another line is not an entry; the message names it.
    """
    content = path.read_bytes()
    yield from _decode(content[: content.rfind(b"\n") + 1], path)


def _encode(entry: Entry) -> bytes:
    values = {name: value if math.isfinite(value) else str(value) for name, value in entry.values.items()}
    return json.dumps({"t": entry.t, "step": entry.step, "values": values}, allow_nan=False).encode() + b"\n"


def _decode(content: bytes, path: Path) -> Iterator[Entry]:
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            record = json.loads(line)
            values = {str(name): float(value) for name, value in record["values"].items()}
            yield Entry(int(record["t"]), int(record["step"]), values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path}, line {number}: not a journal entry: {line[:80]!r} ({error!r})") from error
