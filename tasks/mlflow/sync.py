"""Carries a run's journal out on an MLflow server, any number of times with the same result.

How far it came is in ``shipped.json`` beside the journal. When that, or the answer to a request, is lost, operations
are carried out again: a run is found by its tags instead of made twice, a point with the same key, step, time and
value is one point to MLflow, a model is found by its digest. MLflow is imported when it is needed, not at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rlhf.store import try_lock, unlock
from tasks.mlflow import files as mlflow_files
from tasks.mlflow.journal import JOURNAL, PARENT, end_if_abandoned, operations
from tasks.mlflow.server import (
    brief,
    connect,
    error_code,
    experiment_id,
    is_permanent,
    key,
    tags as tags_of,
    ui_url,
    without_password,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

log = logging.getLogger(__name__)

SHIPPED, SHIP_LOCK = "shipped.json", "ship.lock"
BATCH = 1000  # most metrics in one request that MLflow takes
PARAMS_BATCH = 100  # and most parameters

_BULK = frozenset({"artifact", "table", "dataset", "model", "register"})


class BusyError(RuntimeError):
    """Another process is shipping this journal now."""


@dataclass
class Shipped:
    """How far a journal is shipped: the content of ``shipped.json``.

    ``offset`` is in bytes of the journal; ``runs`` maps ``PARENT`` and stages to MLflow run ids; ``waiting`` are the
    offsets of files, tables, datasets and models that are still to be sent; ``skipped`` counts operations that
    the server will not take; ``ended``: the end of the parent run is shipped, after which nothing comes.
    """

    uri: str = ""
    offset: int = 0
    experiment_id: str = ""
    runs: dict[str, str] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    skipped: int = 0
    ended: bool = False

    @property
    def complete(self) -> bool:
        """Whether all of the journal is shipped, and no more will come."""
        return self.ended and not self.waiting

    @classmethod
    def read(cls, directory: Path) -> Shipped:
        """The state of a run's directory; that of nothing shipped when there is none that can be read."""
        try:
            return cls(**json.loads((directory / SHIPPED).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, directory: Path) -> None:
        """Replace the file at once: a reader, or a kill, never meets half of it."""
        temporary = directory / f"{SHIPPED}.tmp"
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(temporary, directory / SHIPPED)


def ship(directory: Path, tracking_uri: str) -> Shipped:
    """Carry out what a run's journal has and the server has not.

    Raises:
        BusyError: another process is doing that.
        MlflowException: the server does not answer, or not well; try again later.
    """
    with Replay(directory, tracking_uri) as replay:
        return replay.run()


def pending_one_by_one(runs: Path, tracking_uri: str) -> Iterator[bool]:
    """Ship what earlier runs could not; each step ships one run, and says whether it is complete now.

    Those whose process has died are ended as KILLED. Runs whose process lives are left to it, and so are those begun
    with another tracking URI. One that fails is logged and left for the next time.
    """
    for journal in sorted(runs.glob(f"*/{JOURNAL}")):
        directory = journal.parent
        state = Shipped.read(directory)
        if state.complete or state.uri not in ("", without_password(tracking_uri)):
            continue
        try:
            if not end_if_abandoned(directory) or journal.stat().st_size == 0:
                continue
            complete = ship(directory, tracking_uri).complete
        except BusyError:
            continue
        except Exception as error:
            log.warning("the run %s could not be shipped to MLflow yet: %s", directory.name, brief(error))
            complete = False
        yield complete


def run_urls(directory: Path, tracking_uri: str) -> dict[str, str]:
    """Where a browser shows the parent run (``PARENT``) and those of the stages, as far as a server has them."""
    state, base = Shipped.read(directory), ui_url(tracking_uri)
    if base is None:
        return {}
    return {run: f"{base}/#/experiments/{state.experiment_id}/runs/{run_id}" for run, run_id in state.runs.items()}


class Replay:
    """Ships one journal, as often as :meth:`run` is called; as a context manager it holds the journal's ship lock."""

    def __init__(self, directory: Path, tracking_uri: str) -> None:
        self._directory = directory
        self._uri = tracking_uri
        self._lock: int | None = None
        self._checked = False
        self._points: dict[str, list[Metric]] = defaultdict(list)
        self._known: dict[str, list[Run]] = {}
        self._complaints: set[str] = set()
        self.state = Shipped()

    def __enter__(self) -> Self:
        self._lock = try_lock(self._directory / SHIP_LOCK)
        if self._lock is None:
            raise BusyError(f"another process is shipping the run {self._directory.name}")
        self.state = Shipped.read(self._directory)
        if self.state.uri != without_password(self._uri):
            self.state = Shipped(uri=without_password(self._uri))
            self.state.write(self._directory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None

    def run(self) -> Shipped:
        """Ship what is there now: curves and runs first, then files and models.

        Raises:
            MlflowException: the server does not answer; what has been shipped until then is remembered.
        """
        if not self.state.complete:
            try:
                self._check_runs()
                self._ship_lines()
                self._ship_waiting()
            except Exception:
                self._checked = False
                self._known.clear()  # a request may have made a run, and its answer been lost
                self.state = Shipped.read(self._directory)  # what was done since is done again
                raise
        return self.state

    @property
    def _client(self) -> MlflowClient:
        return connect(self._uri)

    def _check_runs(self) -> None:
        """Begin anew when the server has lost the runs of ``shipped.json`` (its database was deleted, say)."""
        for run_id in () if self._checked else self.state.runs.values():
            try:
                self._client.get_run(run_id)
            except Exception as error:
                if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
                    raise
                log.warning("MLflow has lost the run %s; it is shipped again from its journal", self._directory.name)
                self.state = Shipped(uri=self.state.uri)
                break
        self._checked = True

    def _ship_lines(self) -> None:
        """Carry out what is new, but the large things, which wait. The state goes on when all points were sent."""
        self._points.clear()
        end = self.state.offset
        for start, end, operation in operations(self._directory, self.state.offset):
            if operation["op"] == "metrics":
                self._collect(operation)
                if max(map(len, self._points.values())) >= BATCH:
                    self._advance(end)
            elif operation["op"] in _BULK:
                self.state.waiting.append(start)
            else:
                self._carry_out(operation)
        self._advance(end)

    def _advance(self, offset: int) -> None:
        """Send the points collected; then, everything before ``offset`` is done."""
        for run in [*self._points]:
            self._send_points(run)
        if offset != self.state.offset:
            self.state.offset = offset
            self.state.write(self._directory)

    def _ship_waiting(self) -> None:
        """Send what is large, each on its own: one that fails stays, and does not hold up the others."""
        for offset in [*self.state.waiting]:
            _, _, operation = next(operations(self._directory, offset))
            try:
                self._carry_out(operation)
            except Exception as error:
                # This raises when it is MLflow that is down, and not the store of artifacts or something in them.
                self._client.set_tag(self.state.runs[PARENT], "rlhf.run_id", self._directory.name)
                self._complain(f"{_describe(operation)} could not be sent to MLflow yet: {brief(error)}")
            else:
                self.state.waiting.remove(offset)
                self.state.write(self._directory)

    # Curves

    def _collect(self, operation: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        t, step, values = operation["t"], operation["step"], operation["values"]
        points = [Metric(key(name), float(value), t, step) for name, value in values.items()]
        for run in operation["runs"]:
            self._points[run] += points

    def _send_points(self, run: str) -> None:
        points = self._points.pop(run, [])
        for first in range(0, len(points), BATCH):
            with self._skipping(f"metrics of {run}"):
                self._client.log_batch(self.state.runs[run], metrics=points[first : first + BATCH])

    # The other operations

    def _carry_out(self, operation: dict[str, Any]) -> None:
        """Carry out any operation but metrics; one that the server will never take is skipped."""
        with self._skipping(_describe(operation)):
            match operation:
                case {"op": "start"}:
                    self._start(operation)
                case {"op": "params", "run": run, "values": values}:
                    self._params(run, values)
                case {"op": "tags", "run": run, "values": values}:
                    self._tags(run, values)
                case {"op": "end", "run": run, "status": status, "t": t}:
                    self._send_points(run)
                    self._client.set_terminated(self.state.runs[run], status, t)
                    if run == PARENT:
                        self._delete_strays()
                        self.state.ended = True
                case {"op": op, "run": run, **rest} if op in _BULK:
                    self._send_file(op, self.state.runs[run], rest)
                case _:
                    log.warning("run %s: unknown operation %s", self._directory.name, operation["op"])

    def _start(self, op: dict[str, Any]) -> None:
        run, tags, note = op["run"], dict(op["tags"]), op["note"]
        if run == PARENT:
            self.state.experiment_id = experiment_id(self._client, self._uri, op["experiment"], op["columns"])
        else:
            tags["mlflow.parentRunId"] = self.state.runs[PARENT]
        if computed_by := op.get("computed_by"):
            tags["rlhf.computed_by"] = computed_by
            for source in self._find_runs(computed_by, run)[:1]:
                link = f"#/experiments/{self.state.experiment_id}/runs/{source.info.run_id}"
                note = f"From the cache; computed by [{source.info.run_name} of run {computed_by}]({link}).\n\n{note}"
        if note:
            tags["mlflow.note.content"] = note
        tags |= {"rlhf.run_id": self._directory.name, "rlhf.stage": run}
        if run not in self.state.runs:
            found = self._find_runs(self._directory.name, run)
            made = found or [self._client.create_run(self.state.experiment_id, op["t"], tags_of(tags), op["name"])]
            self.state.runs[run] = made[0].info.run_id
        self._params(run, op["params"])

    def _params(self, run: str, values: dict[str, str]) -> None:
        from mlflow.entities import Param

        params = [Param(key(name), value[:6000]) for name, value in values.items()]
        for first in range(0, len(params), PARAMS_BATCH):
            self._client.log_batch(self.state.runs[run], params=params[first : first + PARAMS_BATCH])

    def _tags(self, run: str, values: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self.state.runs[run], tags=[RunTag(*item) for item in tags_of(values).items()])

    def _send_file(self, op: str, run_id: str, fields: dict[str, Any]) -> None:
        fields = {name: value for name, value in fields.items() if name != "t"}
        if "path" in fields:
            fields["path"] = Path(fields["path"])
        match op:
            case "artifact":
                mlflow_files.log_artifact(self._client, run_id, **fields)
            case "table":
                mlflow_files.log_table(self._client, run_id, **fields, scratch=self._directory)
            case "dataset":
                mlflow_files.log_dataset(self._client, run_id, **fields)
            case "model":
                mlflow_files.log_model(self._client, run_id, **fields, scratch=self._directory)
            case "register":
                mlflow_files.register(self._client, run_id, **fields, scratch=self._directory)

    def _find_runs(self, run_id: str, stage: str) -> list[Run]:
        """The MLflow runs of a stage of a pipeline run, oldest first; those of all its stages are asked for at once."""
        found = [run for run in self._known.get(run_id, ()) if run.data.tags.get("rlhf.stage") == stage]
        is_ours = run_id == self._directory.name  # nobody else makes runs of this one
        if found or (is_ours and run_id in self._known):
            return found
        self._known[run_id] = self._search_runs(run_id)
        return [run for run in self._known[run_id] if run.data.tags.get("rlhf.stage") == stage]

    def _search_runs(self, run_id: str) -> list[Run]:
        """The MLflow runs of a pipeline run by their tags, oldest first."""
        query = f"tags.`rlhf.run_id` = '{run_id}'"
        return list(self._client.search_runs([self.state.experiment_id], query, order_by=["start_time ASC"]))

    def _delete_strays(self) -> None:
        """Delete runs made by a request whose answer came too late, so that it was repeated."""
        for run in self._search_runs(self._directory.name):
            if run.info.run_id not in self.state.runs.values():
                self._client.delete_run(run.info.run_id)

    # Errors

    @contextlib.contextmanager
    def _skipping(self, what: str) -> Iterator[None]:
        """Go on after an error that would come again for ever."""
        try:
            yield
        except Exception as error:
            if not is_permanent(error):
                raise
            self.state.skipped += 1
            self._complain(f"{what} is not sent to MLflow: {brief(error)}")

    def _complain(self, message: str) -> None:
        """Say a thing once."""
        if message not in self._complaints:
            self._complaints.add(message)
            log.warning("run %s: %s", self._directory.name, message)


def _describe(operation: dict[str, Any]) -> str:
    return " ".join(str(operation[field]) for field in ("op", "name", "path", "run") if field in operation)
