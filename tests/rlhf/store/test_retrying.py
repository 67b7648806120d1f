"""What can pass is tried again, after growing pauses; what cannot is not."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from rlhf.store.retrying import may_pass, retry


class Clock:
    """Time that passes only by sleeping; ``slept`` has the pauses."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def failing(times: int, error: Exception, takes: float = 0.0, clock: Clock | None = None) -> Callable[[], str]:
    """Something that fails that often before it returns."""
    left = [times]

    def attempt() -> str:
        if clock is not None:
            clock.now += takes
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return "done"

    return attempt


def tried(attempt: Callable[[], str], clock: Clock, factor: float = 1.0, **options: Any) -> str:
    return retry(attempt, clock=lambda: clock.now, sleep=clock.sleep, jitter=lambda low, high: factor, **options)


def test_the_pauses_double_and_are_spread() -> None:
    clock = Clock()
    assert tried(failing(4, TimeoutError()), clock) == "done"
    assert clock.slept == [2, 4, 8, 16]
    spread: list[tuple[float, float]] = []
    retry(failing(1, TimeoutError()), sleep=clock.sleep, jitter=lambda *bounds: spread.append(bounds) or 1.0)  # type: ignore[func-returns-value]
    assert spread == [(0.5, 1.5)]


def test_the_fifth_error_is_the_callers() -> None:
    clock = Clock()
    with pytest.raises(TimeoutError, match="fifth"):
        tried(failing(5, TimeoutError("the fifth")), clock)
    assert len(clock.slept) == 4


def test_the_longest_pauses_fit_in_a_minute() -> None:
    clock = Clock()
    assert tried(failing(4, TimeoutError()), clock, factor=1.5) == "done"
    assert sum(clock.slept) == 45


def test_slow_failures_end_it_earlier() -> None:
    clock = Clock()
    with pytest.raises(TimeoutError):
        tried(failing(9, TimeoutError(), takes=25, clock=clock), clock)
    assert clock.slept == [2, 4]  # 25 + 2 + 25 + 4 + 25 s, and then 8 s more would be over a minute


@pytest.mark.parametrize("error", [PermissionError("no"), FileNotFoundError("no"), ValueError("no")])
def test_what_cannot_pass_is_raised_at_once(error: Exception) -> None:
    clock = Clock()
    with pytest.raises(type(error)):
        tried(failing(1, error), clock)
    assert clock.slept == []


class Botocore:
    """Its errors are known by their names."""

    ConnectionError = type("ConnectionError", (Exception,), {})


def answered(status: int, code: str = "") -> Exception:
    """An error as s3fs raises it: one of Python's, caused by one that has the server's answer."""
    error, cause = OSError(errno.EIO, "said"), Exception("said")
    cause.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}  # type: ignore[attr-defined]
    error.__cause__ = cause
    return error


def with_status(status: int) -> Exception:
    """An error as gcsfs raises it."""
    error = Exception("said")
    error.code = status  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (OSError(errno.EHOSTUNREACH, "no route"), True),
        (OSError(errno.ESTALE, "stale handle"), True),  # a network file system
        (OSError(errno.ENOSPC, "disk full"), False),
        (OSError(errno.EROFS, "read only"), False),
        (answered(500, "InternalError"), True),
        (answered(503, "SlowDown"), True),
        (answered(400, "RequestTimeout"), True),
        (answered(429), True),
        (answered(501, "NotImplemented"), False),
        (answered(403, "AccessDenied"), False),
        (answered(404, "NoSuchBucket"), False),
        (with_status(502), True),
        (with_status(401), False),
        (type("EndpointConnectionError", (Botocore.ConnectionError,), {})("botocore"), True),
        (type("SSLError", (Botocore.ConnectionError,), {})("a certificate"), False),
        (type("ServerDisconnectedError", (type("ClientConnectionError", (Exception,), {}),), {})("aiohttp"), True),
        (type("NoCredentialsError", (Exception,), {})("botocore"), False),
        (TypeError("a mistake"), False),
    ],
)
def test_which_errors_may_pass(error: Exception, passes: bool) -> None:
    assert may_pass(error) is passes
