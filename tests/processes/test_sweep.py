"""Sweeps as whole processes: what the runs share is computed once, a wrong setting starts nothing, nothing is left."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from rlhf.runs.records import read_runs
from tests.processes.sleeping import PLAN, sleeps
from tests.rlhf.projects import good
from tests.team.conftest import wait_for

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
# short beside `ppo`, so that in any order of the others the ideal is within 5 % of the sum over the slots. So is the
# second in which a busy machine passes a slot on.
SECONDS = {"prepare": 0.3, "sft": 0.3, "ppo": 16.0, "evaluate": 0.3}


SLEEPING = (str(Path(__file__).with_name("sleeping.py")),)


def command_of(
    folder: Path, *arguments: str, program: Sequence[str] = ("-m", "flows.commands.cli"), **environment: str
) -> tuple[list[str], dict[str, Any]]:
    """What to run, and with what: arguments of ``subprocess.run``."""
    config = folder / "config.yaml"
    settings = [word for setting in (*SHORT, "tracking.enabled=false") for word in ("--set", setting)]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "RLHF"))}
    paths = {"RLHF_HOME": str(folder / "home"), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, *program, "sweep", str(config), "--json", *settings, *arguments]
    return command, {"env": {**own, **environment, **paths}, "cwd": folder}


def sweep(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command, settings = command_of(folder, *arguments, **options)
    return subprocess.run(command, **settings, capture_output=True, text=True)


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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_runs_keep_two_slots_busy(tmp_path: Path) -> None:
    good(tmp_path)
    plan = {"file": str(tmp_path / "sleeps.jsonl"), "runs": len(KL_COEFS), "seconds": SECONDS}
    options = ("--over", f"ppo.kl_coef={KL_COEFS}", "--runs", "8", "--set", "resources.slots=2")
    done = sweep(tmp_path, *options, program=SLEEPING, **{PLAN: json.dumps(plan)})
    assert done.returncode == 0, done.stderr
    slept = sleeps(tmp_path / "sleeps.jsonl")
    assert Counter(one.stage for one in slept) == {"prepare": 1, "sft": 1, "ppo": 8, "evaluate": 8}
    assert max(sum(other.begin <= one.begin < other.end for other in slept) for one in slept) == 2
    took = max(one.end for one in slept) - min(one.begin for one in slept)
    assert took <= 1.15 * sum(one.seconds for one in slept) / 2


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("cancelled", [True, False])
def test_a_sweep_that_is_stopped_leaves_nothing_running(tmp_path: Path, cancelled: bool) -> None:
    good(tmp_path)
    notes = tmp_path / "sleeps.jsonl"
    plan = {"file": str(notes), "runs": 2, "seconds": {"prepare": 0.1, "sft": 0.1, "ppo": 200.0, "evaluate": 0.1}}
    options = ("--over", "ppo.kl_coef=[0.1, 0.2, 0.3]", "--runs", "2", "--set", "resources.slots=2")
    command, settings = command_of(tmp_path, *options, program=SLEEPING, **{PLAN: json.dumps(plan)})
    with subprocess.Popen(command, **settings, start_new_session=True) as sweeping:
        wait_for(lambda: len(list((tmp_path / "home" / "work").glob("ppo-*"))) == 2, "two runs that are in ppo")
        tree = psutil.Process(sweeping.pid).children(recursive=True)
        if cancelled:  # as a worker does it
            api = next(one.environ()["PREFECT_API_URL"] for one in tree if "PREFECT_API_URL" in one.environ())
            [run] = httpx.post(f"{api}/flow_runs/filter", json={"flows": {"name": {"any_": ["sweep"]}}}).json()
            state = {"state": {"type": "CANCELLING"}, "force": True}
            httpx.post(f"{api}/flow_runs/{run['id']}/set_state", json=state).raise_for_status()
            sweeping.send_signal(signal.SIGTERM)
        else:
            os.killpg(sweeping.pid, signal.SIGINT)  # as a terminal does
        assert sweeping.wait(timeout=30) == (1 if cancelled else 130)
    assert psutil.wait_procs(tree, timeout=5)[1] == []
    assert [record.status for record in read_runs(tmp_path / "home")] == ["interrupted"] * 2
    with sqlite3.connect(tmp_path / "home" / "prefect" / "prefect.db") as database:
        [ended] = database.execute("SELECT state_type FROM flow_run WHERE name LIKE 'sweep %'")
    assert ended == ("CANCELLED" if cancelled else "CRASHED",)


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
