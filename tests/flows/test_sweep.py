"""The parts of a sweep: its combinations, its Ray cluster, and how many runs are under way; tests/team sweeps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any

import pytest

from flows.sweep import MOST_RUNS, _ended, _on_ray, combinations
from rlhf.errors import ConfigError


def test_combinations() -> None:
    found = combinations(["ppo.kl_coef=[0.1, 0.2]", "seed=[1, 2]"])
    assert found == [
        ("ppo.kl_coef=0.1", "seed=1"), ("ppo.kl_coef=0.1", "seed=2"),
        ("ppo.kl_coef=0.2", "seed=1"), ("ppo.kl_coef=0.2", "seed=2"),
    ]  # fmt: skip
    for wrong in (["ppo.kl_coef"], ["ppo.kl_coef=0.1"], ["ppo.kl_coef=[]"], [], [f"seed={list(range(MOST_RUNS + 1))}"]):
        with pytest.raises(ConfigError, match="--over"):
            combinations(wrong)


@pytest.mark.parametrize("there", [True, False])
def test_a_ray_cluster_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool) -> None:
    asked: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        asked.append(options)
        if options["address"] == "auto" and not there:
            raise ConnectionError("nobody answers")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init, shutdown=lambda: asked.append({})))
    monkeypatch.setitem(sys.modules, "prefect_ray", SimpleNamespace(RayTaskRunner=nullcontext))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with _on_ray(3, tmp_path, {}):
        pass
    assert asked[0]["runtime_env"]["env_vars"]["RLHF_HOME"] == str(tmp_path)
    assert asked[-1] == {}
    started = [(options["address"], options.get("num_cpus")) for options in asked[:-1]]
    assert started == ([("auto", None)] if there else [("auto", None), ("local", 3)])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    refused = nullcontext() if there else pytest.raises(ConfigError, match=r"RAY_ADDRESS is '10\.0\.0\.1:6379'")
    with refused, _on_ray(3, tmp_path, {}):
        pass


def test_at_most_so_many_runs_are_under_way_whatever_room_there_is() -> None:
    waiting: list[str] = []  # those under way, the oldest first
    most = 0

    class Run:
        def add_done_callback(self, function: Callable[[Any], None]) -> None:
            Timer(0.02, lambda: function(waiting.pop(0))).start()

    class Roomy:
        def submit(self, task: Any, parameters: dict[str, Any]) -> Run:
            nonlocal most
            waiting.append(parameters["config"])
            most = max(most, len(waiting))
            return Run()

    configs = {name: name for name in "abcdef"}
    assert sorted(name for name, _ in _ended(Roomy(), configs, 2, {})) == sorted(configs)  # type: ignore[arg-type]
    assert most == 2
