"""Two processes compute what one does."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.store import checkpoints
from tests import quick_python

SCRIPT = Path(__file__).with_name("one_of_two.py")
OF_ONE_PROCESS = ("ppo/seconds", "ppo/tokens_per_second", "ppo/peak_memory_bytes")
CHANGES: dict[str, Any] = {"whiten_rewards": True, "scale_scores": True, "eval_every": 1, "judges": ["words"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "lora", "value"), [("gpt2", 0, "separate"), ("llama", 2, "shared"), ("t5", 2, "separate")]
)
def test_two_processes_compute_what_one_does(
    architecture: str, lora: int, value: str, tmp_path: Path, tiny: Any, make_trainer: Callable[..., Any]
) -> None:
    changes = CHANGES | {"architecture": architecture, "lora": lora, "value_model": value}
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    shared |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [quick_python.executable(), SCRIPT, tmp_path / "two", tmp_path / "result.pt", json.dumps(changes)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        one = tiny.first_update(make_trainer(**changes))
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    two = torch.load(tmp_path / "result.pt", weights_only=True)

    assert ((two["gradient"] - one["gradient"]).norm() / one["gradient"].norm()).item() < 1e-5
    assert two["numbers"] == pytest.approx(one["numbers"], rel=1e-5, abs=1e-6)
    for name, value in one["metrics"].items():
        if not name.startswith(OF_ONE_PROCESS):
            assert two["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert checkpoints.latest(tmp_path / "two") is not None
