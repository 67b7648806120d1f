"""The memory of freed tensors on a CPU."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let glibc keep what freed tensors leave, for the next ones. Nothing happens where there is another C library.

    By default every large tensor is memory fresh from the kernel, which pays a page fault for each 4 kB of it, step
    after step. The peak of the memory in use stays as it is; only what is between the peaks is not given back.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)  # tensors of up to 1 GB come from the heap
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # which never shrinks
