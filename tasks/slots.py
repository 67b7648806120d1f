"""One GPU, many runs: a stage that computes on it takes a slot first, and gives it back however it ends.

A slot is two things. A lock on this machine's home folder, which the kernel gives back at once when its holder dies,
and which holds while Prefect's server is away and leases run out; and a lease of Prefect's global concurrency limit
``resources.slot``, which people see in the UI and which counts over all machines.

The lock comes first, so that on one machine only as many ask the server as there are slots.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import copy_context
from pathlib import Path
from uuid import UUID

import httpx
from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from rlhf.config import PipelineConfig
from rlhf.stages import stage_modules
from rlhf.store import POLL_SECONDS, try_lock, unlock
from tasks.prefect.server import is_away, is_private, make_limit, patiently, quickly
from tasks.run import Run

LEASE_SECONDS = 60.0  # after which the slot of a holder that has died on another machine is free again
RENEW_SECONDS = 15.0  # four attempts in a lease, so that a server may be away for most of it
GIVE_BACK_SECONDS = 5.0  # which a server that is away may take of a run's end
ASK_SECONDS = 3.0  # between two questions for a slot that another machine holds
TAKEN, GONE = 423, 410  # HTTP status: all slots are taken; the lease has run out


def takes_slot(stage: str, config: PipelineConfig) -> bool:
    """Whether a stage computes with models: all but ``prepare``, and a judge that asks no model."""
    return stage != "prepare" and (stage != "judge" or len(stage_modules(stage, config)) > 1)


@contextmanager
def slot(run: Run, stage: str) -> Iterator[None]:
    """Hold a slot while a stage computes; wait for one as long as it takes. Nothing for a stage that needs none."""
    with slot_of(run.config, run.store.home) if takes_slot(stage, run.config) else nullcontext():
        yield


@contextmanager
def slot_of(config: PipelineConfig, home: Path, *, leased: bool = True) -> Iterator[None]:
    """Hold a slot while models compute outside of a stage.

    Args:
        config: says which slot, if any.
        home: the folder of all state.
        leased: whether there is a Prefect server, which counts over all machines; without, this machine alone does.
    """
    name, slots = config.resources.slot, config.resources.slots
    if not name:
        yield
        return
    leased = leased and not is_private()
    with ExitStack() as held:
        if leased:
            patiently(lambda: make_limit(name, slots))
        held.callback(unlock, _lock_one(home / "locks", name, slots))
        if leased:
            held.callback(Lease(name).give_back)
        yield


class Lease:
    """A lease of a limit, which a thread renews until it is given back. A server that is away is waited for.

    Prefect's own ends to be renewed when the server is away for three seconds, and asks for a slot that is taken only
    every 40.

    Args:
        name: of the limit. It waits here until one of its slots is free.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        while (lease := patiently(self._ask)) is None:
            time.sleep(ASK_SECONDS * random.SystemRandom().uniform(0.5, 1.5))
        self._id = lease
        self._over = threading.Event()
        # In this context, Prefect's log knows which run this is.
        self._keeper = threading.Thread(target=copy_context().run, args=(self._keep,), daemon=True)
        self._keeper.start()

    def give_back(self) -> None:
        """Free the slot. If that fails, as while the server is away, it is free when the lease runs out."""
        self._over.set()
        self._keeper.join(GIVE_BACK_SECONDS)
        try:
            patiently(self._release, within=GIVE_BACK_SECONDS)
        except Exception as error:  # which is no reason for the stage to fail
            _log().warning("the slot %r is free in %.0f s: %s", self._name, LEASE_SECONDS, error)

    def _ask(self) -> UUID | None:
        """A lease, or None while all slots are taken."""
        task_run = runtime.task_run.id
        holder = ConcurrencyLeaseHolder(type="task_run", id=UUID(task_run)) if task_run else None
        try:
            with get_client(sync_client=True) as client:
                answer = client.increment_concurrency_slots_with_lease(
                    [self._name], 1, "concurrency", LEASE_SECONDS, holder
                )
        except httpx.HTTPStatusError as error:
            if error.response.status_code == TAKEN:
                return None
            raise
        return UUID(answer.json()["lease_id"])

    def _release(self) -> None:
        with get_client(sync_client=True) as client:
            client.release_concurrency_slots_with_lease(self._id)

    def _keep(self) -> None:
        """Renew the lease now and then."""
        while not self._over.wait(RENEW_SECONDS):
            try:
                quickly(self._renew)
            except Exception as error:
                if not is_away(error):
                    _log().warning("the slot %r cannot be kept: %s", self._name, error)

    def _renew(self) -> None:
        """Renew the lease; if it has run out while the server was away, take another, unless someone else has."""
        try:
            with get_client(sync_client=True) as client:
                client.renew_concurrency_lease(self._id, LEASE_SECONDS)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != GONE:
                raise
            lease = self._ask()
            if lease is None:
                _log().warning("the slot %r was lost while Prefect's server was away", self._name)
            else:
                self._id = lease


def _lock_one(folder: Path, name: str, slots: int) -> int:
    """Lock one of the slots of this machine; its file descriptor."""
    said = False
    while True:
        for number in range(slots):
            descriptor = try_lock(folder / f"slot-{name}-{number}.lock")
            if descriptor is not None:
                return descriptor
        if not said:
            _log().info("waiting for one of %d slots %r, which other runs hold", slots, name)
            said = True
        time.sleep(POLL_SECONDS)


def _log() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """Prefect's log of the run; an ordinary one outside of a run."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger(__name__)
