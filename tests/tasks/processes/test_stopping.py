"""SIGTERM and Ctrl-C: the first asks, the second acts, and patience is limited."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import pytest

from rlhf.errors import StoppedError, TrainingError
from rlhf.tracking.stopping import Stop
from tasks.processes.stopping import gently

NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Terminated(BaseException):
    """What the handlers raise that are there before."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, object]]:
    """Handlers that raise, as Prefect's and Python's do; the test leaves them as they are."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    before = {number: signal.signal(number, handler) for number in NUMBERS}
    yield {number: signal.getsignal(number) for number in NUMBERS}
    left = {number: signal.getsignal(number) for number in NUMBERS}
    for number, old in before.items():
        signal.signal(number, old)
    assert left == dict.fromkeys(NUMBERS, handler)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("stopped", [True, False])
def test_the_signal_acts_when_the_block_ends(number: int, stopped: bool) -> None:
    stop, done, told = Stop(), [], []
    with pytest.raises(Terminated) as raised, gently(stop, lambda: told.append(stop.asked)):  # noqa: PT012
        os.kill(os.getpid(), number)
        done.append("the step")
        assert stop.asked
        if stopped:
            raise StoppedError("as asked")
    assert (raised.value.args, done, told) == ((number,), ["the step"], [True])


def test_the_second_one_acts_at_once() -> None:
    with pytest.raises(Terminated) as raised, gently(Stop()):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError
    assert raised.value.args == (signal.SIGINT,)


def test_a_step_that_takes_too_long_is_interrupted() -> None:
    with pytest.raises(Terminated), gently(Stop(), seconds=0.2):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def test_nothing_comes_after_the_block() -> None:
    with pytest.raises(Terminated), gently(Stop(), seconds=0.3):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.6)  # the patience of the block, which must not end what comes after it


def test_errors_are_what_they_are() -> None:
    with pytest.raises(TrainingError), gently(Stop()):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        raise TrainingError("not finite")
    with pytest.raises(StoppedError), gently(Stop()):
        raise StoppedError("someone else asked")
    with gently(stop := Stop()):
        pass
    assert not stop.asked


def test_another_thread_has_no_signals() -> None:
    seen: list[object] = []

    def work() -> None:
        with gently(Stop()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
