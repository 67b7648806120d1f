"""Prefect's server going away fails no run: neither when a stage takes its slot, nor when it gives it back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError

from rlhf.retry import LONGEST_SECONDS
from tasks import prefect_server, slots
from tasks.prefect_server import is_away, patiently

REQUEST = httpx.Request("POST", "http://127.0.0.1:9/api")
AWAY = httpx.ConnectError("refused")
AWAY.__cause__ = ConnectionRefusedError()  # httpx's errors have causes of their own


def status(code: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("status", request=REQUEST, response=httpx.Response(code, request=REQUEST))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long is waited, in seconds; nobody does."""
    found: list[float] = []
    monkeypatch.setattr("tasks.prefect_server.time.sleep", found.append)
    return found


@pytest.mark.parametrize("error", [AWAY, httpx.ReadTimeout("slow"), status(500), status(503), status(429)])
def test_what_can_pass_is_tried_again(error: Exception, pauses: list[float]) -> None:
    calls = iter([error] * 8)

    def call() -> str:
        if failure := next(calls, None):
            raise failure
        return "done"

    assert patiently(call) == "done"
    assert len(pauses) == 8
    usual = [min(LONGEST_SECONDS, prefect_server.FIRST_SECONDS * 2.0**i) for i in range(8)]
    assert all(limit / 2 <= pause <= limit * 1.5 for pause, limit in zip(pauses, usual, strict=True))
    assert len(set(pauses)) == 8  # of random length


@pytest.mark.parametrize("error", [status(404), status(422), ValueError("wrong")])
def test_what_cannot_is_not(error: Exception, pauses: list[float]) -> None:
    def call() -> None:
        raise error

    with pytest.raises(type(error)):
        patiently(call)
    assert pauses == []


def test_patience_ends(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefect_server, "PATIENCE_SECONDS", 0.0)

    def call() -> None:
        raise AWAY

    with pytest.raises(httpx.ConnectError):
        patiently(call)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A limit on a server that is away at first, and again when the slot is given back; what happened to it."""
    happened: list[str] = []

    @contextmanager
    def concurrency(name: str, **options: object) -> Iterator[None]:
        happened.append("asked")
        if happened.count("asked") < 3:
            raise ConcurrencySlotAcquisitionError("Unable to acquire") from AWAY
        try:
            yield
        finally:
            happened.append("left")
            raise AWAY

    monkeypatch.setattr(slots, "concurrency", concurrency)
    monkeypatch.setattr(slots, "get_run_logger", lambda: logging.getLogger("tasks.slots"))
    return happened


def test_a_slot_of_a_server_that_comes_and_goes(
    server: list[str], pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with slots._lease("gpu"):
        server.append("computed")
    assert server == ["asked", "asked", "asked", "computed", "left"]
    assert "free in 60 s" in caplog.text


def test_the_error_of_a_stage_is_not_hidden(server: list[str], pauses: list[float]) -> None:
    with pytest.raises(FloatingPointError, match="the loss is nan"), slots._lease("gpu"):
        raise FloatingPointError("the loss is nan")
    assert server[-1] == "left"


def test_an_error_that_looks_the_same_is_the_stage_s_own(server: list[str], pauses: list[float]) -> None:
    with pytest.raises(httpx.ConnectError, match="reward service"), slots._lease("gpu"):
        raise httpx.ConnectError("reward service")


def test_a_wrapped_error_is_away_by_its_cause() -> None:
    wrapped = ConcurrencySlotAcquisitionError("Unable to acquire")
    assert not is_away(wrapped)
    wrapped.__cause__ = AWAY
    assert is_away(wrapped)
