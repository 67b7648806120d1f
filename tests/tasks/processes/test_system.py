"""What a stage costs: seen by a thread that can neither fail nor hold up the stage."""

from __future__ import annotations

import logging
import mmap
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from tasks.processes import system

MB = 1_000_000


class Points:
    """What was recorded, point by point."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []
        self.steps: list[int] = []
        self.came = threading.Event()

    def __call__(self, values: dict[str, float], step: int) -> None:
        self.values.append(values)
        self.steps.append(step)
        self.came.set()

    def wait(self) -> None:
        """Return after the next point."""
        self.came.clear()
        assert self.came.wait(60)


@pytest.fixture
def points() -> Points:
    return Points()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "SECONDS", 0.02)


def test_one_point_at_once_and_one_at_the_end_under_mlflow_s_names(points: Points) -> None:
    with system.measured(points, gpus=0) as cost:
        pass
    assert points.steps == [0, 1]
    names = {"system_memory_usage_megabytes", "system_memory_usage_percentage", "process_memory_megabytes"}
    assert points.values[0].keys() == {f"system/{name}" for name in names}
    assert points.values[1].keys() == {f"system/{name}" for name in {*names, "cpu_utilization_percentage"}}
    assert cost.keys() >= {"peak_memory_bytes"}
    assert cost["peak_memory_bytes"] >= points.values[0]["system/process_memory_megabytes"] * MB


def test_the_names_are_mlflow_s() -> None:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

    monitor = CPUMonitor()
    monitor.collect_metrics()
    memory = system._Memory()
    assert set(monitor.metrics) <= system._machine(memory).keys()


def test_the_peak_is_that_of_the_block_and_also_seen_between_two_samples(points: Points) -> None:
    with system.measured(points, gpus=0) as small:
        pass
    with system.measured(points, gpus=0) as large:
        while len(points.steps) < 3:  # it has begun
            time.sleep(0.01)
        with mmap.mmap(-1, 300 * MB) as pages:  # not from the allocator, which may have kept as much; soon gone
            for _ in range(300):
                pages.write(bytes(MB))
    with system.measured(points, gpus=0) as after:
        pass
    assert large["peak_memory_bytes"] > small["peak_memory_bytes"] + 250 * MB
    assert after["peak_memory_bytes"] < large["peak_memory_bytes"] - 200 * MB


@pytest.mark.usefixtures("often")
def test_a_process_that_the_stage_starts_counts_and_one_that_was_there_does_not(points: Points) -> None:
    hold = [sys.executable, "-c", "import sys; held = b'x' * 200_000_000; print(1, flush=True); sys.stdin.read()"]

    def started() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    def ended(process: subprocess.Popen[bytes]) -> None:
        process.communicate()

    before = started()
    with system.measured(points, gpus=0) as alone:
        points.wait()
    with system.measured(points, gpus=0) as both:
        points.wait()
        own = started()
        points.wait()
        points.wait()
        ended(own)
    ended(before)
    assert both["peak_memory_bytes"] > alone["peak_memory_bytes"] + 150 * MB


@pytest.mark.usefixtures("often")
def test_a_failure_is_logged_once_and_the_stage_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def fail(values: dict[str, float], step: int) -> None:
        calls.append(step)
        raise OSError("the disk is full")

    with caplog.at_level(logging.WARNING), system.measured(fail, gpus=0) as cost:
        pass
    assert calls == [0]
    assert [record.message for record in caplog.records] == ["what the stage costs is not measured any further"]
    assert "peak_memory_bytes" in cost


def test_what_hangs_does_not_hold_up_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "PATIENCE", 0.01)
    hang, began = threading.Event(), threading.Event()

    def record(values: dict[str, float], step: int) -> None:
        began.set()
        hang.wait(60)

    with system.measured(record, gpus=0):
        assert began.wait(60)
    assert not hang.is_set()  # we are here while it still hangs
    hang.set()


def test_an_error_of_the_stage_comes_through(points: Points) -> None:
    with pytest.raises(KeyboardInterrupt), system.measured(points, gpus=0):
        raise KeyboardInterrupt
    assert points.steps[-1] == 1


def fake_nvml(energy: list[int], used: list[int]) -> types.ModuleType:
    """An NVML with two GPUs, whose counters say the next number each time; GPU 1 tells no energy and no utilization."""
    nvml = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def told(values: list[int], handle: int) -> int:
        if handle:
            raise NVMLError("not supported")
        return values.pop(0) if len(values) > 1 else values[0]

    nvml.NVMLError = NVMLError  # type: ignore[attr-defined]
    for name, function in {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": lambda name: {"GPU-b": 1}[name],
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(
            used=1000 if handle else told(used, handle), total=10_000
        ),
        "nvmlDeviceGetUtilizationRates": lambda handle: types.SimpleNamespace(gpu=told([40], handle)),
        "nvmlDeviceGetPowerUsage": lambda handle: 70_000,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 280_000,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: told(energy, handle),
    }.items():
        setattr(nvml, name, function)
    return nvml


def test_gpus_tell_what_they_can(monkeypatch: pytest.MonkeyPatch, points: Points) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(system, "_cpu_packages", list)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([5_000, 5_000, 8_000, 12_000], [4000, 3000]))
    with system.measured(points, gpus=2) as cost:
        pass
    assert cost["gpu_peak_memory_bytes"] == 4000 + 1000
    assert cost["energy_joules"] == 7.0
    first = points.values[0]
    assert first["system/gpu_0_utilization_percentage"] == 40
    assert first["system/gpu_0_memory_usage_percentage"] == 40
    assert first["system/gpu_1_power_usage_watts"] == 70
    assert first["system/gpu_1_power_usage_percentage"] == 25
    assert "system/gpu_1_utilization_percentage" not in first


@pytest.mark.parametrize(
    ("visible", "count", "found"),
    [
        (None, 1, [0]),
        (None, 8, [0, 1]),
        ("1", 1, [1]),
        ("1,0", 2, [1, 0]),
        ("GPU-b", 1, [1]),
        ("", 1, []),
        (None, 0, []),
    ],
)
def test_the_gpus_are_those_that_cuda_shows(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, found: list[int]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([0], [0]))
    assert [gpu._handle for gpu in system._gpus(count)] == found


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml([0], [0])

    def no_driver() -> None:
        raise nvml.NVMLError("Driver Not Loaded")

    nvml.nvmlInit = no_driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert system._gpus(1) == []


def test_cpu_packages_count_once_and_over_the_end_of_their_range(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def zone(name: str, kind: str) -> Path:
        (tmp_path / name).mkdir()
        for file, content in (("name", kind), ("max_energy_range_uj", "10000000"), ("energy_uj", "9000000")):
            (tmp_path / name / file).write_text(f"{content}\n")
        return tmp_path / name / "energy_uj"

    package = zone("intel-rapl:0", "package-0")
    zone("intel-rapl:0:0", "core")  # within the package
    zone("intel-rapl:1", "psys")  # the whole machine, packages included
    monkeypatch.setattr(system, "POWERCAP", tmp_path)
    [joules] = system._cpu_packages()
    assert joules() == 0.0
    package.write_text("9500000\n")
    assert joules() == 0.5
    package.write_text("1500000\n")
    assert joules() == 2.5
    package.unlink()
    assert system._cpu_packages() == []
