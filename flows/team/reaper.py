"""Runs that nobody carries any more: found, and given the state that is true of them.

A flow run of this package holds a lock in the home folder as long as its process lives (``tasks.prefect.flow_runs``).
So one that Prefect calls Running and whose lock is free is dead, for certain and at once, where heartbeats would take
minutes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psutil

from flows.team.deployments import POOL
from rlhf.store import home_directory
from tasks.prefect.flow_runs import dead_flow_runs, flow_run_lives, flow_run_was_here, forget_flow_run

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State, StateType

POLL_SECONDS = 0.5
CANCELLING_SECONDS = 45.0  # more than a cancellation takes, on another machine too
PENDING_SECONDS = 30.0  # more than a worker takes to start a process
PAUSED = "up.paused"  # in the home folder: the pool is paused by rlhf up, and not by a person
UNENDED = ("RUNNING", "PENDING", "CANCELLING")  # types of states


def reap(worker: str, pool: str = POOL) -> list[str]:
    """End the runs whose process is gone, before a worker starts on this machine; the names of those runs.

    What was running becomes Crashed, what was being cancelled Cancelled, and what had not begun is scheduled again.
    Runs that may be another machine's are left alone: those that never were on this one, while other workers are
    online.

    Args:
        worker: the name of this machine's worker, which is not there now.
        pool: the work pool.
    """
    from prefect.client.orchestration import get_client

    home, found = home_directory(), []
    with get_client(sync_client=True) as client:
        alone = _alone(client, worker, pool)
        for run in _runs(pool):
            if flow_run_lives(home, str(run.id)) or not (alone or flow_run_was_here(home, str(run.id))):
                continue
            _correct(client, run)
            found.append(run.name)
    return found


def reap_killed() -> list[str]:
    """End the runs whose process has been killed on this machine, at any time; the names of those runs.

    A worker that sees its run's process die says so itself; one that was killed, too, cannot.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    home, found = home_directory(), []
    if not (dead := dead_flow_runs(home)):
        return []
    with get_client(sync_client=True) as client:
        for flow_run in dead:
            with suppress(ObjectNotFound):  # one of a server that is there no more
                run = client.read_flow_run(UUID(flow_run))
                if _type(run) in UNENDED:
                    _correct(client, run)
                    found.append(run.name)
            forget_flow_run(home, flow_run)
    return found


def reap_unbegun(worker: str, pool: str = POOL) -> list[str]:
    """Schedule the runs again whose process ended before they had begun; the names of those runs.

    A process that cannot ask the server, as its database is away, ends without having said that the run is its own. A
    pool that other workers serve too is left alone: their processes are not seen from here.

    Args:
        worker: the name of this machine's worker.
        pool: the work pool.
    """
    from prefect.client.orchestration import get_client

    home, found = home_directory(), []
    with get_client(sync_client=True) as client:
        for run in _runs(pool):
            process, since = run.infrastructure_pid or "", run.state.timestamp if run.state else None
            if _type(run) != "PENDING" or since is None or flow_run_lives(home, str(run.id)):
                continue
            gone = process.isdecimal() and not psutil.pid_exists(int(process))
            if gone and time.time() - since.timestamp() > PENDING_SECONDS and _alone(client, worker, pool):
                _correct(client, run)
                found.append(run.name)
    return found


def _alone(client: SyncPrefectClient, worker: str, pool: str) -> bool:
    """Whether no worker but this one serves a pool."""
    return not any(
        other.status is not None and other.status.value == "ONLINE" and other.name != worker
        for other in client.read_workers_for_work_pool(pool)
    )


def reap_cancelled(pool: str = POOL) -> list[str]:
    """End the runs that were cancelled before they had begun; the names of those runs.

    Prefect's engine then ends without a word, and the run would stay Cancelling. One whose process lives on this
    machine is left alone, however long it takes.
    """
    from prefect.client.orchestration import get_client

    home, found = home_directory(), []
    with get_client(sync_client=True) as client:
        for run in _runs(pool):
            since = run.state.timestamp if run.state else None
            if _type(run) != "CANCELLING" or since is None or flow_run_lives(home, str(run.id)):
                continue
            if time.time() - since.timestamp() > CANCELLING_SECONDS:
                _correct(client, run)
                found.append(run.name)
    return found


def _correct(client: SyncPrefectClient, run: FlowRun) -> None:
    """Give a run whose process is gone the state that is true of it."""
    from prefect.states import Cancelled, Crashed, Scheduled

    state: State[Any] = {
        "RUNNING": Crashed(message="Its process is gone."),
        "CANCELLING": Cancelled(message="Its process is gone."),
        "PENDING": Scheduled(message="Its process was gone before it began."),
    }[_type(run)]
    client.set_flow_run_state(run.id, state, force=True)
    forget_flow_run(home_directory(), str(run.id))


def pause(home: Path, pool: str = POOL) -> None:
    """Let no worker begin a run of the pool, until :func:`go_on`. One that a person has paused is left to that person.

    A file in the home folder says so first: :func:`go_on` finds it, also after this process has been killed.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolUpdate

    with get_client(sync_client=True) as client:
        if not client.read_work_pool(pool).is_paused:
            (home / PAUSED).touch()
            client.update_work_pool(pool, WorkPoolUpdate(is_paused=True))


def go_on(home: Path, pool: str = POOL) -> None:
    """End the pause that :func:`pause` began, if it did."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolUpdate

    if (home / PAUSED).exists():
        with get_client(sync_client=True) as client:
            client.update_work_pool(pool, WorkPoolUpdate(is_paused=False))
        (home / PAUSED).unlink()


def cancel_all(timeout: float, pool: str = POOL) -> tuple[list[str], list[str]]:
    """Cancel every run of the pool, and wait for their processes; names of those that ended, and of those made Crashed.

    The pool is paused, or else runs that wait would take the places of those that end.

    Args:
        timeout: seconds that running stages get to write a checkpoint and end.
        pool: the work pool.
    """
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelled, Cancelling, Crashed

    asked: dict[UUID, str] = {}  # names
    deadline = time.monotonic() + timeout
    with get_client(sync_client=True) as client:
        while left := _runs(pool):
            for run in left:
                asked[run.id] = run.name
                if _type(run) != "CANCELLING":  # at first; later, one that the worker was just starting
                    pending = _type(run) == "PENDING"
                    client.set_flow_run_state(run.id, Cancelled() if pending else Cancelling(), force=pending)
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        for run in left:
            client.set_flow_run_state(run.id, Crashed(message="rlhf up was stopped."), force=True)
    crashed = [run.id for run in left]
    return [name for key, name in asked.items() if key not in crashed], [asked[key] for key in crashed]


def _runs(pool: str) -> Sequence[FlowRun]:
    """The runs of a pool that are going on, or were when someone last heard of them."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        WorkPoolFilter,
        WorkPoolFilterName,
    )
    from prefect.client.schemas.objects import StateType

    types: list[StateType] = [StateType[name] for name in UNENDED]
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types))),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
        )


def _type(run: FlowRun) -> str:
    return run.state_type.value if run.state_type else ""
