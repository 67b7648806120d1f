"""What SIGTERM and Ctrl-C do to a training: first they ask it to end at its next step, with a checkpoint.

Prefect's worker cancels a run by SIGTERM, which Prefect turns into an exception wherever the program happens to be. In
the middle of a step there is nothing to be saved.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rlhf.errors import StoppedError
from rlhf.tracking import Stop

STOP_SECONDS = 10.0  # for the step that is under way; a cancelled run is to be gone within 15


@contextmanager
def gently(stop: Stop, tell: Callable[[], None] = lambda: None, seconds: float = STOP_SECONDS) -> Iterator[None]:
    """Within the block, the first SIGTERM or Ctrl-C asks ``stop``; what it does otherwise, it does when the block ends.

    It does so at once if the block takes longer than ``seconds``, or if a second one comes. Nothing is changed in any
    other than the main thread, since those get no signals.

    Args:
        tell: called when the signal has come.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    came: list[int] = []
    patience = threading.Timer(seconds, lambda: os.kill(os.getpid(), came[0]))
    patience.daemon = True

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        restore()
        came.append(number)
        stop.asked = True
        patience.start()
        tell()

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    except StoppedError:
        if not came:  # someone else has asked
            raise
    finally:
        restore()
        patience.cancel()
    if came:
        signal.raise_signal(came[0])
        raise KeyboardInterrupt  # the signal is ignored here; there is nothing to go on with
