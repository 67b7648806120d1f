"""Trying again what can pass: a server that is away, slow or busy, but not one that says no.

Storage drivers raise exceptions of their own, which are known here by their names and by the HTTP status that they
carry, so that none of the drivers has to be there.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

TRIES = 5
WITHIN_SECONDS = 60.0
FIRST_SECONDS, LONGEST_SECONDS = 2.0, 16.0
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
PASSING_CODES = frozenset({"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "OperationAborted"})
PASSING_ERRNO = frozenset({
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EINTR, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.ESTALE, errno.ETIMEDOUT,
})  # fmt: skip
# Names of classes of botocore, aiohttp, azure and google, and of what they derive from.
PASSING_NAMES = frozenset({
    "ClientConnectionError", "ClientPayloadError", "ConnectionError", "HTTPClientError", "IncompleteRead",
    "IncompleteReadError", "ResponseParserError", "ServiceRequestError", "ServiceResponseError", "TransportError",
})  # fmt: skip
LASTING_NAMES = frozenset({"SSLError", "ClientSSLError", "ClientConnectorCertificateError"})

_jitter = random.SystemRandom()  # of its own: a training's random numbers stay what they are


def retry(
    attempt: Callable[[], T],
    *,
    passes: Callable[[Exception], bool] | None = None,
    tries: int | None = TRIES,
    within: float = WITHIN_SECONDS,
    first: float = FIRST_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
    jitter: Callable[[float, float], float] = _jitter.uniform,
) -> T:
    """Call ``attempt`` until it returns; its result.

    The pauses are 2, 4, 8, and from then on 16 seconds, each times a random number from 0.5 to 1.5, so that machines
    which failed together do not come back together.

    Args:
        attempt: what to do. It must be harmless to do it twice.
        passes: whether it is worth trying again after an error (default: :func:`may_pass`).
        tries: most calls; None for as many as there is time for.
        within: seconds after which no further call begins.
        first: the first pause in seconds, before it is made random.
        clock: seconds.
        sleep: waits for some seconds.
        jitter: a random number between two.

    Raises:
        Exception: the error of the last call.
    """
    began = clock()
    for number in count(1):
        try:
            return attempt()
        except Exception as error:
            pause = min(first * 2.0 ** min(number - 1, 20), LONGEST_SECONDS) * jitter(0.5, 1.5)
            last = number == tries or clock() + pause - began > within
            if last or not (passes or may_pass)(error):
                raise
            log.info("try %d failed (%s: %s); again in %.1f s", number, type(error).__name__, error, pause)
        sleep(pause)
    raise AssertionError("unreachable")


def may_pass(error: BaseException) -> bool:
    """Whether an error of a file system may be gone a little later: time-outs, connections, 5xx, throttling."""
    chain = list(_causes(error))
    names = {base.__name__ for one in chain for base in type(one).__mro__}
    if names & LASTING_NAMES:
        return False
    statuses, code = {status for one in chain if (status := http_status(one)) is not None}, error_code(error)
    if statuses or code:  # a server has answered
        return bool(statuses & PASSING_STATUS) or code in PASSING_CODES
    if any(isinstance(one, TimeoutError | ConnectionError) for one in chain) or names & PASSING_NAMES:
        return True
    return any(isinstance(one, OSError) and one.errno in PASSING_ERRNO for one in chain)


def error_code(error: BaseException) -> str:
    """The word by which S3 names an error, such as ``NoSuchBucket``, of the error or of what caused it; else empty."""
    for one in _causes(error):
        response: Any = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code") or "")
    return ""


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an error carries; None if it carries none."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    for name in ("status_code", "status", "code"):  # azure, aiohttp, gcsfs
        value = getattr(error, name, None)
        if isinstance(value, int | str) and str(value).isdigit() and 100 <= int(value) <= 599:
            return int(value)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__
