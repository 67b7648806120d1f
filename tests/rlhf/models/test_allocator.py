from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from rlhf.models import allocator
if {keep}:
    allocator.keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(25):
        torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)  # of the second time
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is one of glibc")
def test_freed_memory_is_used_again() -> None:
    def page_faults(keep: bool) -> int:
        code = CODE.format(keep=keep)
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    assert page_faults(keep=True) < 20
    assert page_faults(keep=False) > 200  # otherwise there is nothing to gain, and the setting can go
