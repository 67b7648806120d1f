"""One GPU, many runs: a stage that computes on it takes a slot first, and gives it back however it ends.

A slot is two things. A lock on this machine's home folder, which the kernel gives back at once when its holder dies,
and which holds while Prefect's server is away and leases run out; and a lease of Prefect's global concurrency limit
``resources.slot``, which people see in the UI and which counts over all machines.

The lock comes first: who waits for it goes on within ``POLL_SECONDS``. Whom Prefect refuses a lease asks again only
after up to 40 seconds, so that on one machine only as many ask as there are slots.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from prefect.concurrency.sync import concurrency
from prefect.logging import get_run_logger

from rlhf.config import PipelineConfig
from rlhf.locks import POLL_SECONDS, try_lock, unlock
from rlhf.stages import stage_modules
from tasks.prefect_server import is_away, is_private, make_limit, patiently
from tasks.run import Run

LEASE_SECONDS = 60.0  # after which the slot of a holder that has died on another machine is free again


def takes_slot(stage: str, config: PipelineConfig) -> bool:
    """Whether a stage computes with models: all but ``prepare``, and a judge that asks no model."""
    return stage != "prepare" and (stage != "judge" or len(stage_modules(stage, config)) > 1)


@contextmanager
def slot(run: Run, stage: str) -> Iterator[None]:
    """Hold a slot while a stage computes; wait for one as long as it takes. Nothing for a stage that needs none."""
    name, slots = run.config.resources.slot, run.config.resources.slots
    if not name or not takes_slot(stage, run.config):
        yield
        return
    with ExitStack() as held:
        if not is_private():
            patiently(lambda: make_limit(name, slots))
        held.callback(unlock, _lock_one(run.store.home / "locks", name, slots))
        if not is_private():
            held.enter_context(_lease(name))
        yield


@contextmanager
def _lease(name: str) -> Iterator[None]:
    """Hold a lease of the limit. A server that is away is waited for at the beginning, and not at the end."""

    def take() -> AbstractContextManager[None]:
        lease = concurrency(name, strict=True, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False)
        lease.__enter__()
        return lease

    lease = patiently(take)

    def give_back(
        kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return lease.__exit__(kind, error, traceback)
        except Exception as failure:
            if failure is error or not is_away(failure):
                raise
            get_run_logger().warning("the slot %r is free in %.0f s: Prefect's server is away", name, LEASE_SECONDS)
            return None

    with ExitStack() as stack:
        stack.push(give_back)
        yield


def _lock_one(folder: Path, name: str, slots: int) -> int:
    """Lock one of the slots of this machine; its file descriptor."""
    said = False
    while True:
        for number in range(slots):
            descriptor = try_lock(folder / f"slot-{name}-{number}.lock")
            if descriptor is not None:
                return descriptor
        if not said:
            get_run_logger().info("waiting for one of %d slots %r, which other runs hold", slots, name)
            said = True
        time.sleep(POLL_SECONDS)
