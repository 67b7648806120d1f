"""A sweep: every combination is run, what the runs share is computed once, and a wrong setting starts nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from flows.sweep import MOST_RUNS, combinations
from rlhf.errors import ConfigError
from tests.flows.sleeping import PLAN, sleeps
from tests.rlhf.projects import good

SHORT = (
    "judge=off",
    "reward=off",
    "sft.max_steps=2",
    "sft.batch_size=4",
    "ppo.updates=2",
    "ppo.rewards={brevity: 1.0}",
)

REWARDS = """
def fine(prompts, responses):
    return [1.0 for _ in responses]
def broken(prompts, responses):
    raise ValueError("no good")
"""


KL_COEFS = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08]

# Seconds. What comes before the runs part is one at a time, and a run's last stage may be the last of all: both are
# short beside `ppo`, so that in any order of the others the ideal is within 5 % of the sum over the slots.
SECONDS = {"prepare": 0.3, "sft": 0.3, "ppo": 6.0, "evaluate": 0.3}


def sweep(
    folder: Path, *arguments: str, program: Sequence[str] = ("-m", "flows.cli"), **environment: str
) -> subprocess.CompletedProcess[str]:
    config = folder / "config.yaml"
    settings = [word for setting in (*SHORT, "tracking.enabled=false") for word in ("--set", setting)]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "RLHF"))}
    return subprocess.run(
        [sys.executable, *program, "sweep", str(config), "--json", *settings, *arguments],
        env={**own, **environment, "RLHF_HOME": str(folder / "home"), "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_combinations() -> None:
    found = combinations(["ppo.kl_coef=[0.1, 0.2]", "seed=[1, 2]"])
    assert found == [
        ("ppo.kl_coef=0.1", "seed=1"), ("ppo.kl_coef=0.1", "seed=2"),
        ("ppo.kl_coef=0.2", "seed=1"), ("ppo.kl_coef=0.2", "seed=2"),
    ]  # fmt: skip
    for wrong in (["ppo.kl_coef"], ["ppo.kl_coef=0.1"], ["ppo.kl_coef=[]"], [], [f"seed={list(range(MOST_RUNS + 1))}"]):
        with pytest.raises(ConfigError, match="--over"):
            combinations(wrong)


@pytest.mark.slow
@pytest.mark.timeout(900)  # eight processes import torch at once
def test_eight_runs_compute_what_they_share_once(tmp_path: Path) -> None:
    good(tmp_path)
    done = sweep(tmp_path, "--over", f"ppo.kl_coef={KL_COEFS}", "--runs", "8")
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)
    assert len(runs) == len({run["run_id"] for run in runs.values()}) == 8
    computed = Counter(stage for run in runs.values() for stage, row in run["stages"].items() if not row["cached"])
    assert computed == {"prepare": 1, "sft": 1, "ppo": 8, "evaluate": 8}
    assert len({run["stages"]["sft"]["digest"] for run in runs.values()}) == 1
    again = sweep(tmp_path, "--over", f"ppo.kl_coef={KL_COEFS[:2]}")
    rows = [row["cached"] for run in json.loads(again.stdout).values() for row in run["stages"].values()]
    assert rows == [True] * 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_runs_keep_two_slots_busy(tmp_path: Path) -> None:
    good(tmp_path)
    plan = {"file": str(tmp_path / "sleeps.jsonl"), "runs": len(KL_COEFS), "seconds": SECONDS}
    options = ("--over", f"ppo.kl_coef={KL_COEFS}", "--runs", "8", "--set", "resources.slots=2")
    program = (str(Path(__file__).with_name("sleeping.py")),)
    done = sweep(tmp_path, *options, program=program, **{PLAN: json.dumps(plan)})
    assert done.returncode == 0, done.stderr
    slept = sleeps(tmp_path / "sleeps.jsonl")
    assert Counter(one.stage for one in slept) == {"prepare": 1, "sft": 1, "ppo": 8, "evaluate": 8}
    assert max(sum(other.begin <= one.begin < other.end for other in slept) for one in slept) == 2
    took = max(one.end for one in slept) - min(one.begin for one in slept)
    assert took <= 1.15 * sum(one.seconds for one in slept) / 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_wrong_is_said_and_spares_the_others(tmp_path: Path) -> None:
    good(tmp_path)
    done = sweep(tmp_path, "--over", "ppo.kl_coef=[0.1, -1]")
    assert (done.returncode, done.stdout) == (2, "")
    assert "ppo.kl_coef" in done.stderr
    assert not (tmp_path / "home" / "store").exists()
    assert sweep(tmp_path, "--over", "ppo.rewards=[{brevity: 1.0}, {mine:fine: 1.0}]").returncode == 2
    assert not (tmp_path / "home" / "store").exists()
    (tmp_path / "mine.py").write_text(REWARDS)
    done = sweep(tmp_path, "--over", "ppo.rewards=[{mine:fine: 1.0}, {mine:broken: 1.0}]")
    assert done.returncode == 1
    assert "1 of 2 runs failed: tiny-2" in done.stderr
    assert "no good" in done.stderr
    assert len(list((tmp_path / "home" / "store" / "ppo").iterdir())) == 1
