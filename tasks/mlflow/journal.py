"""The journal of one pipeline run: everything that MLflow is to be told, on this machine first.

``<runs>/<run id>/journal.jsonl`` is a list of operations, one JSON object a line, only ever appended to by the one
process that owns the run. Each says what it is (``op``), which run it is about (``run``: a stage, or ``PARENT``), when
it was (``t``, milliseconds since 1970) and can be carried out any number of times with the same result. That is what
``tasks.mlflow.sync`` does; nothing in here knows MLflow, waits for a server, or is lost when one is down.

| op       | fields                                       | becomes                                                |
|----------|----------------------------------------------|--------------------------------------------------------|
| start    | name, tags, params, note; experiment, columns | an MLflow run                                         |
| start    | name, tags, params, note; computed_by        | a stage's run below it                                 |
| params   | values                                       | parameters                                             |
| tags     | values                                       | tags                                                   |
| metrics  | runs (several), step, values                 | one point of each curve, in each of the runs           |
| artifact | path, destination                            | a file, or the content of a folder                     |
| table    | path, destination                            | a Parquet file, and a table that the UI shows          |
| dataset  | name, digest, source, context, rows          | a dataset input                                        |
| model    | name, path, digest, kind                     | a logged model that loads back; one for each digest    |
| register | the same; registered, about, note, tags      | a version of a registered model; one for each digest   |
| end      | status                                       | the end of the run                                     |
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from rlhf.errors import ArtifactError
from rlhf.runs import OWNER
from rlhf.store import is_locked, lock, unlock
from rlhf.tracking import Entry, Listener, Progress, read_journal

PARENT = "pipeline"  # the run of the whole pipeline, as the stages' names are those of their runs
JOURNAL = "journal.jsonl"

Status = Literal["FINISHED", "FAILED", "KILLED"]


class RunJournal:
    """Writes the journal of one pipeline run; made by :meth:`open`. Methods may be called from any thread.

    As a context manager it ends what is still running when the block is left: FINISHED, FAILED after an exception,
    KILLED after an interruption (``KeyboardInterrupt``, ``SystemExit`` or another that is no ``Exception``).
    """

    def __init__(self, directory: Path, descriptor: int) -> None:
        self.directory = directory
        self._path = directory / JOURNAL
        self._owner: int | None = descriptor
        self._lock = threading.Lock()
        self._name = PARENT
        self._running: list[str] = []
        self._started: set[str] = set()
        self._curves: set[str] = set()

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Own the run of this directory, which is made if need be, until :meth:`close` or the end of the process.

        The directory's name is the run's id. A journal that is there already, of an owner that has died, is gone on
        with; a last line that its death cut off is dropped.

        Raises:
            ArtifactError: another process that lives owns it.
        """
        directory = directory.resolve()
        descriptor = lock(directory / OWNER, timeout=1.0)  # someone may be looking whether it is owned
        if descriptor is None:
            raise ArtifactError(f"the run {directory} belongs to a process that is still going")
        journal = cls(directory, descriptor)
        journal._take_up()
        return journal

    # The runs

    def start(
        self,
        name: str,
        *,
        experiment: str,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, object] | None = None,
        note: str = "",
        columns: Collection[str] = (),
    ) -> None:
        """Begin the parent run.

        Args:
            name: the pipeline's name; the stages' runs are called ``<name>/<stage>``.
            experiment: the MLflow experiment that all runs of this journal go to.
            params: the decisions that one compares runs by, about 20 to 40, dotted (``ppo.kl_coef``). The whole
                configuration is better kept as an artifact.
            tags: what else is constant.
            note: a description in Markdown.
            columns: what the table of runs shows in the view named after the project, such as
                ``metrics.evaluate/rougeL`` or ``params.ppo.kl_coef``.
        """
        self._name = name
        self._start(PARENT, name, tags, params, note, experiment=experiment, columns=list(columns))

    def start_stage(
        self,
        stage: str,
        *,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, object] | None = None,
        note: str = "",
        computed_by: str | None = None,
    ) -> None:
        """Begin a stage's run, below the parent's.

        Args:
            stage: its name.
            params: as in :meth:`start`.
            tags: such as ``rlhf.cache`` (``hit`` or ``miss``), ``rlhf.key``, ``rlhf.digest``.
            note: a description in Markdown.
            computed_by: for a stage from the cache, the id of the pipeline run that computed it, to be linked to.
        """
        self._start(stage, f"{self._name}/{stage}", tags, params, note, computed_by=computed_by)

    def end(self, run: str, status: Status = "FINISHED") -> None:
        """End one run; ending the parent ends the stages that still run first, with the same status."""
        for name in [*self._running] if run == PARENT else [run]:
            if name != PARENT:
                self._end(name, status)
        if run == PARENT:
            self._end(PARENT, status)

    @property
    def running(self) -> tuple[str, ...]:
        """The runs that were started and have not ended, in the order of their start."""
        return tuple(self._running)

    # What is known of a run

    def params(self, run: str, values: Mapping[str, object]) -> None:
        """Add parameters; one that has been given cannot change."""
        self._write("params", run=run, values=_texts(values))

    def tags(self, run: str, values: Mapping[str, object]) -> None:
        """Set tags; ``mlflow.note.content`` is the description."""
        self._write("tags", run=run, values=_texts(values))

    def metrics(self, stage: str, values: Mapping[str, float], step: int, t: int | None = None) -> None:
        """Add one point to each curve, in the stage's run and in the parent's. ``t`` in unix milliseconds; now."""
        self._curves.update(values)
        self._write("metrics", t, runs=[stage, PARENT], step=step, values=_numbers(values))

    def system(self, stage: str, values: Mapping[str, float], step: int) -> None:
        """Add one point to each curve of what the stage's machine does, in the stage's run alone."""
        self._write("metrics", runs=[stage], step=step, values=_numbers(values))

    def finals(self, stage: str, values: Mapping[str, float], headline: Collection[str] | None = None) -> None:
        """Add final figures (one point at step 0) to the stage's run; those in ``headline`` (default: all) to the
        parent's too.

        A figure with the name of a curve would be one more point of that: it becomes ``stage/final_name``.
        """
        named = {self._final(name): value for name, value in values.items()}
        headlines = set(named) if headline is None else {self._final(name) for name in headline}
        self._write("metrics", runs=[stage], step=0, values=_numbers(named))
        top = {name: value for name, value in named.items() if name in headlines}
        if top:
            self._write("metrics", runs=[PARENT], step=0, values=_numbers(top))

    def replay(self, stage: str, metrics_file: Path) -> None:
        """Add the curves of a stage that was computed before, with their own times. No file: nothing to add."""
        if metrics_file.exists():
            for entry in read_journal(metrics_file):
                self.metrics(stage, entry.values, entry.step, entry.t)

    def listener(self, stage: str) -> Listener:
        """What a stage's ``JournalTracker`` tells its entries to; progress is left to a display."""

        def listen(event: Entry | Progress) -> None:
            if isinstance(event, Entry):
                self.metrics(stage, event.values, event.step, event.t)

        return listen

    def artifact(self, run: str, path: Path, destination: str = "") -> None:
        """Keep a file, or the content of a folder, in the run's folder ``destination``.

        The path must stay as it is until it is shipped; :meth:`text` is for what has no such place.
        """
        self._write("artifact", run=run, path=str(path.resolve()), destination=destination)

    def text(self, run: str, name: str, content: str) -> None:
        """Keep a text as the artifact ``name``, such as ``config.yaml``."""
        path = self.directory / "files" / run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        self.artifact(run, path, Path(name).parent.as_posix().removeprefix("."))

    def table(self, run: str, path: Path, destination: str = "") -> None:
        """Keep a Parquet file, and its first rows as a table that the MLflow UI shows and compares."""
        self._write("table", run=run, path=str(path.resolve()), destination=destination)

    def dataset(
        self, run: str, name: str, digest: str, source: str, context: str = "training", rows: int | None = None
    ) -> None:
        """Record an input. ``digest`` is ours: MLflow's own does not see an edit in the middle of a file."""
        self._write("dataset", run=run, name=name, digest=digest, source=source, context=context, rows=rows)

    def model(self, run: str, name: str, path: Path, digest: str, kind: str) -> None:
        """Log a Hugging Face model directory; ``mlflow.pyfunc.load_model`` loads it (see ``tasks.mlflow.serving``).

        The model that an earlier run logged with this digest is attached to this run instead of copied again.
        ``kind`` is what it is for, such as ``policy`` or ``reward``.
        """
        self._write("model", run=run, name=name, path=str(path.resolve()), digest=digest, kind=kind)

    def register(
        self,
        run: str,
        registered: str,
        *,
        name: str,
        path: Path,
        digest: str,
        kind: str,
        about: str,
        note: str,
        tags: Mapping[str, object],
    ) -> None:
        """Make a model that was logged by :meth:`model` a version of a registered one, as the last candidate.

        Args:
            run: the run that has logged it.
            registered: name of the registered model, which is made with the description ``about`` if need be.
            name: this, ``path``, ``digest`` and ``kind`` are as in :meth:`model`.
            path: of the model.
            digest: of its content; a version with the same one is found instead of made.
            kind: what it is for.
            about: what the registered model is, in Markdown.
            note: what this version is, in Markdown.
            tags: of the version.
        """
        model = {"name": name, "path": str(path.resolve()), "digest": digest, "kind": kind}
        more: dict[str, Any] = {"tags": _texts({**tags, "rlhf.run_id": self.directory.name}), **model}
        self._write("register", run=run, registered=registered, about=about, note=note, **more)

    # Its lifetime

    def close(self) -> None:
        """Give up the run. What has not ended then counts as killed."""
        with self._lock:
            if self._owner is not None:
                unlock(self._owner)
                self._owner = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status: Status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        if self._running:
            self.end(PARENT, status)
        self.close()

    def _start(
        self,
        run: str,
        name: str,
        tags: Mapping[str, object] | None,
        params: Mapping[str, object] | None,
        note: str,
        **more: Any,
    ) -> None:
        self._started.add(run)
        more |= {"tags": _texts(tags or {}), "params": _texts(params or {}), "note": note}
        self._write("start", run=run, name=name, **more)
        if run not in self._running:  # a second attempt at a stage goes on in the same run
            self._running.append(run)

    def _end(self, run: str, status: Status, t: int | None = None) -> None:
        if run in self._running:
            self._write("end", t, run=run, status=status)
            self._running.remove(run)

    def _final(self, name: str) -> str:
        stage, _, rest = name.rpartition("/")
        return f"{stage}/final_{rest}".lstrip("/") if name in self._curves else name

    def _write(self, op: str, t: int | None = None, **fields: Any) -> None:
        about = fields["runs"] if "runs" in fields else [fields["run"]]
        if unknown := {*about} - self._started:
            raise ValueError(f"cannot add {op}: no run {sorted(unknown)} was started in {self.directory}")
        record = {"op": op, "t": time.time_ns() // 1_000_000 if t is None else t, **fields}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._lock:
            if self._owner is None:
                raise ArtifactError(f"the journal of the run {self.directory} is closed; {op} cannot be added")
            with self._path.open("ab", buffering=0) as file:
                file.write(line)

    def _take_up(self) -> None:
        """Cut off a torn last line, and learn from the others what is running."""
        end = 0
        for _, end, operation in operations(self.directory):  # noqa: B007
            match operation["op"]:
                case "start":
                    self._started.add(operation["run"])
                    self._running = [*dict.fromkeys([*self._running, operation["run"]])]
                    self._name = operation["name"] if operation["run"] == PARENT else self._name
                case "end":
                    self._running.remove(operation["run"])
                case "metrics" if PARENT in operation["runs"] and len(operation["runs"]) > 1:
                    self._curves.update(operation["values"])
        if self._path.exists():
            os.truncate(self._path, end)


class Operation(NamedTuple):
    """One line of a journal, from byte ``start`` up to byte ``end``."""

    start: int
    end: int
    record: dict[str, Any]


def operations(directory: Path, offset: int = 0) -> Iterator[Operation]:
    """What a run's journal holds from a byte offset on; not a last line that is cut off, or still being written.

    Raises:
        ArtifactError: a line is not an operation; the message names it.
    """
    path = directory / JOURNAL
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                record["op"]
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(f"{path}, byte {offset}: not a journal line: {line[:80]!r} ({error!r})") from error
            yield Operation(offset, offset := offset + len(line), record)


def owner_lives(directory: Path) -> bool:
    """Whether the process that writes this run's journal is there."""
    return is_locked(directory / OWNER)


def end_if_abandoned(directory: Path) -> bool:
    """End as KILLED what is still running in a journal whose owner has died, at the time of its last sign of life.

    Returns:
        Whether the journal is now final: its owner gone, and all its runs ended.
    """
    if owner_lives(directory):
        return False
    try:
        journal = RunJournal.open(directory)
    except ArtifactError:
        return False
    try:
        path = directory / JOURNAL
        t = int(path.stat().st_mtime * 1000) if path.exists() else None
        for run in reversed(journal.running):
            journal._end(run, "KILLED", t)
    finally:
        journal.close()
    return True


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def _numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    """As in a stage's journal: a value that JSON has no number for is a string that ``float()`` reads."""
    return {name: float(value) if math.isfinite(value) else str(float(value)) for name, value in values.items()}
