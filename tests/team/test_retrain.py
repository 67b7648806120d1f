"""Scheduled retraining on a real server: runs are scheduled, the worker runs them, and only what is new is learnt."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.team.conftest import Up, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


# It likes best whom it meets last: base, SFT, PPO and the references in turn; after them a champion.
JUDGE = """
import itertools

calls = itertools.count()

def later(prompts, responses):
    call = next(calls)
    return [call + 0.1 * (row % 2) for row in range(len(responses))]
"""


def deploy(up: Up, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.commands.cli", "deploy", str(folder / "nightly.yaml"), *arguments],
        env={"PREFECT_API_URL": f"{up.prefect}/api", "HOME": str(folder), "PATH": ""},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A configuration of one's own, with data that can change."""
    rows = [{"prompt": f"What is {i} plus {i}?", "response": f"It is {2 * i}."} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "nightly.yaml").write_text("""\
name: nightly
data: {demonstrations: data.jsonl, validation_fraction: 0.2, test_fraction: 0.3}
model: {init: random, layers: 1, width: 8, heads: 2, context: 64, vocab_size: 300}
sft: {max_steps: 2, batch_size: 4}
judge: off
reward: off
ppo: {rewards: {brevity: 1.0}, updates: 1, episodes: 4, max_new_tokens: 4}
evaluate: {prompts: 8, max_new_tokens: 4, bootstrap: 20, scorers: {later: "judge.py:later"}}
promotion: {judge: later, min_prompts: 2, kl_budget: null, rouge_floor: null}
resources: {threads: 1}
""")
    return tmp_path


@pytest.fixture
def nightly(up: Up, project: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Its deployment, due at the times of ``request.param``; it is gone after the test."""
    done = deploy(up, project, "--cron", request.param, "--timezone", "Europe/Berlin")
    assert done.returncode == 0, done.stderr
    assert "retrain/nightly" in done.stdout
    found = up.deployment("retrain/nightly")
    yield found
    for name in ("retrain/nightly", "pipeline/nightly"):
        up.api("DELETE", f"deployments/{up.deployment(name)['id']}")


def runs(up: Up, deployment: str, name: str) -> list[dict[str, Any]]:
    """The runs of a deployment whose state has that name, oldest first."""
    body = {"deployments": {"id": {"any_": [deployment]}}, "flow_runs": {"state": {"name": {"any_": [name]}}}}
    return list(up.api("POST", "flow_runs/filter", sort="EXPECTED_START_TIME_ASC", **body))


@pytest.mark.parametrize("nightly", ["* * * * *"], indirect=True)
def test_a_schedule_retrains_when_there_is_something_new(up: Up, project: Path, nightly: dict[str, Any]) -> None:
    [schedule] = nightly["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("* * * * *", "Europe/Berlin")
    # The server makes the runs, the worker runs them; nobody asks.
    wait_for(lambda: runs(up, nightly["id"], "Scheduled"), "scheduled runs")
    [first] = wait_for(lambda: runs(up, nightly["id"], "Promoted"), "the first retraining")
    assert first["auto_scheduled"]
    assert "there is no champion yet" in first["state"]["message"]
    assert "later: 2.05 of the candidate, 1.05 of the policy before it, sft" in first["state"]["message"]
    [change] = json.loads((up.home / "champions" / "nightly.json").read_text())["changes"]
    held = change["champion"]
    assert set(held["keys"]) == {"prepare", "sft", "ppo", "evaluate"}

    [quiet, *_] = wait_for(lambda: runs(up, nightly["id"], "Nothing new"), "a retraining without news")
    assert "Compared the data (data.jsonl), the configuration and the code" in quiet["state"]["message"]
    assert held["run_id"] in quiet["state"]["message"]

    with (project / "data.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "What is new?", "response": "This row."}) + "\n")
    [later] = wait_for(lambda: runs(up, nightly["id"], "Refused"), "one of the new data")
    assert "prepare: data.demonstrations[0] data.jsonl" in later["state"]["message"]
    assert f"4.05 of the champion, run {held['run_id']}; the difference -2 is not surely" in later["state"]["message"]


@pytest.fixture
def asked(up: Up, project: Path) -> Iterator[str]:
    """A deployment that asks a person before it promotes."""
    more = ("--set", "promotion.approval=true", "--set", "name=asked", "--set", "promotion.approval_hours=0.05")
    done = deploy(up, project, "--cron", "0 0 1 1 *", *more)
    assert done.returncode == 0, done.stderr
    yield "retrain/asked"
    for name in ("retrain/asked", "pipeline/asked"):
        up.api("DELETE", f"deployments/{up.deployment(name)['id']}")


def test_a_person_approves_in_the_ui(up: Up, asked: str) -> None:
    run = up.submit(asked)
    wait_for(lambda: up.state(run) == "PAUSED", "the question")
    answer = up.api("POST", f"flow_runs/{run}/resume", run_input={"promote": True, "who": "eve", "why": "read them"})
    assert answer["status"] == "ACCEPT", answer
    assert up.finish(run) == "COMPLETED"
    state = up.api("GET", f"flow_runs/{run}")["state"]
    assert state["name"] == "Promoted"
    assert "approved by eve in Prefect's UI: read them" in state["message"]
    [change] = json.loads((up.home / "champions" / "asked.json").read_text())["changes"]
    assert change["who"] == "eve"

    # The same once more, and nobody answers.
    for role in ("champions", "candidates"):
        (up.home / role / "asked.json").unlink()
    config = up.deployment(asked)["parameters"]["config"]
    config["promotion"]["approval_hours"] = 0.004  # 14 s
    run = up.submit(asked, config=config)
    wait_for(lambda: up.state(run) in ("COMPLETED", "FAILED"), "the end of waiting")
    state = up.api("GET", f"flow_runs/{run}")["state"]
    assert state["name"] == "Refused", state["message"]
    assert "nobody approved it within 0.004 hours" in state["message"]
    assert not (up.home / "champions" / "asked.json").exists()


@pytest.mark.parametrize("nightly", ["0 0 1 1 *"], indirect=True)  # no run but those of the test
def test_late_runs_do_not_pile_up(up: Up, nightly: dict[str, Any]) -> None:
    asked = [up.submit("retrain/nightly") for _ in range(4)]
    states = sorted(up.finish(run) for run in asked)
    assert states.count("COMPLETED") >= 1
    assert set(states) <= {"COMPLETED", "CANCELLED"}
    assert "CANCELLED" in states


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--cron", "every night"), "every night"),
        (("--cron", "0 3 * * *", "--timezone", "Mars/Olympus"), "Mars/Olympus"),
    ],
)
def test_a_schedule_that_cannot_be_read(up: Up, project: Path, arguments: tuple[str, ...], says: str) -> None:
    done = deploy(up, project, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
