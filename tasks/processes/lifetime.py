"""That no process outlives the one it works for, however that one ends.

It needs neither Prefect nor MLflow, and is quick to import.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # https://man7.org/linux/man-pages/man2/prctl.2.html


def end_with(parent: int, by: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent goes; at once, if it has gone already.

    Args:
        parent: the parent's process id, as the parent itself told it.
        by: the signal.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it went before this could be asked for
        os.kill(os.getpid(), by)
