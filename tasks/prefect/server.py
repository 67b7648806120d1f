"""What this package keeps on a Prefect server (a work pool, limits), and how it asks one that may be away."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar
from uuid import UUID

from rlhf.store import retry

PATIENCE_SECONDS = 300.0  # with a server that is away
FIRST_SECONDS = 0.1  # before it is asked again for the first time
T = TypeVar("T")
PRIVATE = "RLHF_PRIVATE_PREFECT"  # set by a run whose Prefect API ends with it, and has no UI and no scheduler


def is_private() -> bool:
    """Whether the API of this process is its own, so that no other run is to be met there."""
    return bool(os.environ.get(PRIVATE))


def patiently(call: Callable[[], T], within: float | None = None) -> T:
    """What a call of Prefect's API gives; again and again while the server is away or busy.

    Prefect's clients come back to a server that is busy after 2 seconds, which every other stage would pay on SQLite
    (``database is locked``); and to one that does not listen, as while it is started again, only if they have met it.

    Args:
        within: seconds (default: ``PATIENCE_SECONDS``).

    Raises:
        Exception: the error of the last call: one that will not pass, or after that time.
    """
    seconds = PATIENCE_SECONDS if within is None else within
    attempt = partial(quickly, call)
    return retry(attempt, passes=is_away, tries=None, within=seconds, first=FIRST_SECONDS, sleep=time.sleep)


def quickly(call: Callable[[], T]) -> T:
    """What a call of Prefect's API gives, or its error, without the client's own attempts in between."""
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        return call()


def is_away(error: Exception) -> bool:
    """Whether an error says that Prefect's server does not answer, or not now."""
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    return isinstance(error, httpx.TransportError)


def make_pool(name: str) -> None:
    """A work pool of processes on the worker's machine, unless there is a pool of that name, of whatever type."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.workers.process import ProcessWorker

    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            template = ProcessWorker.get_default_base_job_template()
            try:
                client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
            except ObjectAlreadyExists:  # made by another process in this moment
                return


def make_limit(name: str, slots: int) -> None:
    """The global concurrency limit of a name with so many slots, unless there is one: its size is then left alone."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            try:
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=slots))
            except ObjectAlreadyExists:
                return


def is_being_cancelled() -> bool:
    """Whether someone has cancelled the present flow run. False where Prefect does not answer."""
    import httpx
    from prefect import runtime
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(str(runtime.flow_run.id))).state
    except (httpx.HTTPError, PrefectHTTPStatusError):
        return False
    return state is not None and state.is_cancelling()
