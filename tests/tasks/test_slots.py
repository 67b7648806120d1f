"""Prefect's server going away fails no run: neither when a stage takes its slot, nor when it gives it back."""

from __future__ import annotations

import logging
import threading
from contextlib import nullcontext
from uuid import UUID, uuid4

import httpx
import pytest

from rlhf.store.retrying import LONGEST_SECONDS
from tasks import slots
from tasks.prefect import server as prefect_server
from tasks.prefect.server import patiently
from tasks.slots import LEASE_SECONDS

REQUEST = httpx.Request("POST", "http://127.0.0.1:9/api")
AWAY = httpx.ConnectError("refused")


def status(code: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("status", request=REQUEST, response=httpx.Response(code, request=REQUEST))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long is waited, in seconds; nobody does."""
    found: list[float] = []
    monkeypatch.setattr("tasks.prefect.server.time.sleep", found.append)
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


class FakeServer:
    """A limit with one slot: what is asked of it, and the errors that it answers with first."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.errors: dict[str, list[Exception]] = {"take": [], "renew": [], "release": []}
        self.renewed = threading.Event()
        self.leases: list[UUID] = []

    def _answer(self, what: str) -> None:
        self.happened.append(what)
        if self.errors[what]:
            raise self.errors[what].pop(0)

    def increment_concurrency_slots_with_lease(
        self, names: list[str], slots: int, mode: str, lease_duration: float, holder: object
    ) -> httpx.Response:
        assert (names, slots, mode, lease_duration) == (["gpu"], 1, "concurrency", LEASE_SECONDS)
        self._answer("take")
        self.leases.append(uuid4())
        return httpx.Response(200, json={"lease_id": str(self.leases[-1]), "limits": []})

    def renew_concurrency_lease(self, lease: UUID, seconds: float) -> None:
        assert seconds == LEASE_SECONDS
        assert lease == self.leases[-1]
        self._answer("renew")
        self.renewed.set()

    def release_concurrency_slots_with_lease(self, lease: UUID) -> None:
        assert lease == self.leases[-1]
        self._answer("release")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """One that answers, and is asked to renew all the time."""
    found = FakeServer()
    monkeypatch.setattr(slots, "get_client", lambda **options: nullcontext(found))
    monkeypatch.setattr(slots, "get_run_logger", lambda: logging.getLogger("tasks.slots"))
    monkeypatch.setattr(slots, "RENEW_SECONDS", 0.01)
    return found


def test_a_server_that_is_away_is_waited_for(server: FakeServer, pauses: list[float]) -> None:
    server.errors["take"] = [AWAY, status(503)]
    lease = slots.Lease("gpu")
    assert server.renewed.wait(30)
    lease.give_back()
    assert [what for what in server.happened if what != "renew"] == ["take", "take", "take", "release"]


def test_a_slot_that_another_machine_holds_is_waited_for(server: FakeServer, pauses: list[float]) -> None:
    server.errors["take"] = [status(slots.TAKEN)] * 4
    slots.Lease("gpu").give_back()
    assert server.happened.count("take") == 5
    assert len(pauses) == 4
    assert all(slots.ASK_SECONDS / 2 <= pause <= slots.ASK_SECONDS * 1.5 for pause in pauses)


def test_a_lease_is_renewed_whatever_becomes_of_the_server(
    server: FakeServer, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    server.errors["renew"] = [AWAY] * 20 + [status(slots.GONE)]
    server.errors["take"] = []
    lease = slots.Lease("gpu")
    assert server.renewed.wait(30)
    lease.give_back()
    assert server.happened[:23] == ["take", *["renew"] * 21, "take"]  # it had run out: another one
    assert caplog.text == ""


def test_a_slot_that_is_lost_is_said(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    lease = slots.Lease("gpu")
    server.errors["take"] = [status(slots.TAKEN)]
    server.errors["renew"] = [status(slots.GONE)]
    assert server.renewed.wait(30) or caplog.text
    lease.give_back()
    assert "was lost while Prefect's server was away" in caplog.text


@pytest.mark.parametrize("error", [AWAY, status(422)])
def test_a_slot_that_cannot_be_given_back_fails_no_stage(
    error: Exception, server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slots, "GIVE_BACK_SECONDS", 0.3)
    server.errors["release"] = [error] * 1000
    slots.Lease("gpu").give_back()
    assert "free in 60 s" in caplog.text
