"""What a stage costs while it computes: memory of its processes, memory and energy of its GPUs, energy of the CPU.

A thread looks every few seconds. What it sees becomes curves in MLflow's tab "System metrics", under MLflow's own
names, and at the end the ``cost`` of the stage's manifest:

| name                    | what                                                                                    |
|-------------------------|-----------------------------------------------------------------------------------------|
| ``peak_memory_bytes``   | most resident memory of this process and those that it started for the stage, together; |
|                         | on Linux from the peaks that the kernel keeps, elsewhere from what is used at a sample   |
| ``gpu_peak_memory_bytes`` | most memory in use on the stage's GPUs at a sample, whoever used it                    |
| ``energy_joules``       | of the stage's GPUs (NVML's counter) and of the CPU packages (RAPL, where it is         |
|                         | readable), whoever used it; only what the devices tell                                  |

Nothing here can fail or hold up a stage: an error is logged once, and the rest of the stage is not measured.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

log = logging.getLogger(__name__)

SECONDS = 5.0  # between two samples
PATIENCE = 2.0  # seconds to wait for the last sample: a driver may hang
POWERCAP = Path("/sys/class/powercap")
MEGABYTE = 1e6  # as MLflow counts

Record = Callable[[dict[str, float], int], None]  # takes one point of each curve, and its step
Energy = Callable[[], float | None]  # joules since it was made; None where it is not told


@contextmanager
def measured(record: Record, gpus: int) -> Iterator[dict[str, float]]:
    """Measure while the block runs.

    Args:
        record: is called in another thread.
        gpus: how many of the GPUs that CUDA would show to this process the stage uses at most.

    Yields:
        The cost, which is complete when the block is left.
    """
    cost: dict[str, float] = {}
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(record, gpus, cost, done), name="system metrics", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # no more threads
        log.warning("what the stage costs is not measured: %s", error)
    try:
        yield cost
    finally:
        done.set()
        if thread.ident is not None:
            thread.join(PATIENCE)


def _watch(record: Record, gpus: int, cost: dict[str, float], done: threading.Event) -> None:
    """Sample at once, every ``SECONDS``, and at the end."""
    try:
        memory, devices, packages = _Memory(), _gpus(gpus), _cpu_packages()
        energy = [counter for counter in (*(device.energy for device in devices), *packages) if counter() is not None]
        psutil.cpu_percent()  # it says what was used since it was last asked
        step, last = 0, False
        while True:
            point = _machine(memory) | {
                f"gpu_{index}_{name}": value
                for index, device in enumerate(devices)
                for name, value in device.sample().items()
            }
            cost["peak_memory_bytes"] = float(memory.peak)
            if used := sum(device.used for device in devices):
                cost["gpu_peak_memory_bytes"] = max(cost.get("gpu_peak_memory_bytes", 0.0), float(used))
            if energy:
                cost["energy_joules"] = sum(counter() or 0.0 for counter in energy)
            if step == 0:
                del point["cpu_utilization_percentage"]  # of no time at all
            record({f"system/{name}": value for name, value in point.items()}, step)
            if last:
                return
            last = done.wait(SECONDS)
            step += 1
    except Exception:
        log.warning("what the stage costs is not measured any further", exc_info=True)


# ------------------------------------------------------------------------------------------------- memory and processor
def _machine(memory: _Memory) -> dict[str, float]:
    """The machine's processor and memory, under MLflow's names, and the memory of the stage's own processes."""
    whole = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": whole.used / MEGABYTE,
        "system_memory_usage_percentage": whole.used / whole.total * 100,
        "process_memory_megabytes": memory.sample() / MEGABYTE,
    }


class _Memory:
    """Resident memory of this process and of all that it starts from now on; shared pages count in each of them."""

    def __init__(self) -> None:
        self._this = psutil.Process()
        self._others = set(self._this.children(recursive=True))  # such as Prefect's server
        self._exact = _forget_peak()
        self.peak = 0

    def sample(self) -> int:
        """Bytes now; ``peak`` is what they were at most."""
        ours = [self._this, *(set(self._this.children(recursive=True)) - self._others)]
        now = peak = 0
        for process in ours:
            with suppress(psutil.Error, OSError):  # it has ended meanwhile
                resident = int(process.memory_info().rss)
                now += resident
                peak += max(resident, _kernel_peak(process.pid)) if self._exact else resident
        self.peak = max(self.peak, peak)
        return now


def _forget_peak() -> bool:
    """Let the kernel's high-water mark of this process begin anew (proc(5), clear_refs); false where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _kernel_peak(os.getpid()) > 0
    except OSError:
        return False


def _kernel_peak(pid: int) -> int:
    """The most bytes of resident memory that a process had (VmHWM); 0 where Linux does not say."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


# ---------------------------------------------------------------------------------------------------------------- GPUs
class _Gpu:
    """One GPU as NVML tells of it; each figure only where that GPU, or its driver, has it."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.used = 0
        self._millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")

    def energy(self) -> float | None:
        """Joules since this object was made."""
        now = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if now is None or self._millijoules is None else (now - self._millijoules) / 1e3

    def sample(self) -> dict[str, float]:
        """Under MLflow's names, without their ``gpu_<number>_``."""
        found: dict[str, float] = {}
        if memory := self._ask("nvmlDeviceGetMemoryInfo"):
            self.used = int(memory.used)
            found["memory_usage_megabytes"] = memory.used / MEGABYTE
            found["memory_usage_percentage"] = memory.used / memory.total * 100
        if rates := self._ask("nvmlDeviceGetUtilizationRates"):
            found["utilization_percentage"] = float(rates.gpu)
        if milliwatts := self._ask("nvmlDeviceGetPowerUsage"):
            found["power_usage_watts"] = milliwatts / 1e3
            if limit := self._ask("nvmlDeviceGetEnforcedPowerLimit"):
                found["power_usage_percentage"] = milliwatts / limit * 100
        return found

    def _ask(self, function: str) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle)
        except self._nvml.NVMLError:
            return None


def _gpus(count: int) -> list[_Gpu]:
    """The first ``count`` GPUs that CUDA shows to this process, as far as NVML knows them."""
    if not count:
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [str(number) for number in range(pynvml.nvmlDeviceGetCount())] if chosen is None else chosen.split(",")
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(name)
            for name in map(str.strip, names[:count])
            if name not in ("", "-1")
        ]
    except pynvml.NVMLError:  # there is no driver, as there is no GPU
        return []
    return [_Gpu(pynvml, handle) for handle in handles]


# ----------------------------------------------------------------------------------------------------------------- RAPL
class _Package(NamedTuple):
    """A CPU package's energy counter (Linux, powercap/intel-rapl; AMD's has the same name), in microjoules."""

    file: Path
    wraps_at: int

    def read(self) -> int:
        return int(self.file.read_text(encoding="ascii"))


def _cpu_packages() -> list[Energy]:
    """A counter for each CPU package that may be read; since 2020 kernels let root alone do that."""
    found = []
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):
        with suppress(OSError, ValueError):
            if (zone / "name").read_text(encoding="ascii").startswith("package"):
                package = _Package(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text(encoding="ascii")))
                found.append(_since_now(package))
    return found


def _since_now(package: _Package) -> Energy:
    last, total = package.read(), 0

    def joules() -> float:
        nonlocal last, total
        now = package.read()
        total += now - last if now >= last else now - last + package.wraps_at
        last = now
        return total / 1e6

    return joules
