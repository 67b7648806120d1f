"""Stages in two processes as a user runs them: through the command line, into the cache, with the log in Prefect."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import LogSort

from tests.rlhf.projects import good

Rlhf = Callable[..., tuple[int, str, str]]
TWO = {"resources.processes": 2}
REWARDS = """import os
def loud(prompts, responses):
    print("said by rank", os.environ.get("RANK"), flush=True)
    return [float(len(response)) for response in responses]
def broken(prompts, responses):
    raise ValueError("no good")
"""


def prefect_log() -> list[str]:
    with get_client(sync_client=True) as client:
        return [entry.message for entry in client.read_logs(limit=200, sort=LogSort.TIMESTAMP_DESC)]


@pytest.fixture
def call(rlhf: Rlhf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rlhf:
    """The command line on a small project, until PPO."""
    monkeypatch.chdir(tmp_path)
    config = str(good(tmp_path))
    (tmp_path / "our_rewards.py").write_text(REWARDS)
    settings = {
        "judge": "off", "reward": "off", "tracking.enabled": "false", "resources.device": "cpu", "sft.max_steps": 2,
        "sft.batch_size": 4, "sft.log_every": 1, "ppo.updates": 1, "ppo.rewards": "{our_rewards:loud: 1.0}",
    }  # fmt: skip

    def call(command: str, *more: str, **changes: Any) -> tuple[int, str, str]:
        words = [word for name, value in (settings | changes).items() for word in ("--set", f"{name}={value}")]
        return rlhf(command, config, "--until", "ppo", *words, *more)

    return call


@pytest.mark.slow
def test_a_run_in_two_processes(call: Rlhf, tmp_path: Path) -> None:
    code, _, error = call("run", **TWO)
    assert (code, error) == (0, "")
    plans = json.loads(call("plan", "--json")[1])
    assert [plan["action"] for plan in plans] == ["cached"] * 3  # for one process, too
    manifest = json.loads(next((tmp_path / "home/store/ppo").glob("*/manifest.json")).read_text())
    assert manifest["device"].endswith("cores), 2 processes")
    assert len(next((tmp_path / "home/store/sft").glob("*/metrics.jsonl")).read_text().splitlines()) >= 2

    deadline = time.monotonic() + 30
    said = {f"said by rank {rank}" for rank in range(2)}
    while not said <= set(prefect_log()) and time.monotonic() < deadline:  # Prefect sends its log from time to time
        time.sleep(0.5)
    assert said <= set(prefect_log())


@pytest.mark.slow
def test_what_goes_wrong_in_two_processes(call: Rlhf) -> None:
    code, _, error = call("run", **TWO, sft="off", **{"ppo.rewards": "{our_rewards:broken: 1.0}"})
    assert code == 1
    assert error.startswith("rlhf: RewardError: ppo update 1: ")
    assert "(rank " in error
    assert "Traceback" not in error
    code, _, error = call("run", **TWO, **{"ppo.episodes": 7})
    assert code == 2
    assert "ppo.episodes 7 must be a multiple of resources.processes * ppo.minibatches = 2 * 1" in error
    code, _, error = call("run", **TWO, **{"resources.accelerate_config": "nowhere.yaml"})
    assert code == 2
    assert "nowhere.yaml: there is no such file" in error
