"""``rlhf up``: what it starts works together, and nothing of it is left behind."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import httpx
import psutil
import pytest

from flows.team.deployments import shipped
from flows.team.heartbeats import ENVIRONMENT, FOUND, LOST
from rlhf.store import checkpoints
from tests.team.conftest import Up, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMOKE = {"preset": "demo", "size": "smoke", "overrides": ["resources.threads=1"]}
STAGES = ["prepare", "sft", "judge", "reward", "ppo", "evaluate"]


def rows(markdown: str) -> dict[str, list[str]]:
    """The rows of a table in Markdown, by their first cell."""
    cells = [[cell.strip() for cell in line.strip("|").split(" |")] for line in markdown.splitlines() if "|" in line]
    return {row[0]: row for row in cells[2:]}


@pytest.fixture(scope="module")
def first(up: Up) -> str:
    """A run that has computed all."""
    run = up.submit("preset/run", **SMOKE)
    assert up.finish(run) == "COMPLETED"
    return run


def only(up: Up, run: str, stage: str) -> urllib.parse.SplitResult:
    """Where the table of a run's stages leads for one of them alone."""
    return urllib.parse.urlsplit(re.search(r"\[only\]\(([^)]*)\)", rows(up.artifacts(run)["stages"])[stage][7])[1])


@pytest.fixture(scope="module")
def again(up: Up, first: str) -> str:
    """One stage of it again, and the others from the cache."""
    parameters = json.loads(urllib.parse.parse_qs(only(up, first, "ppo").query)["parameters"][0])
    run = up.submit("preset/run", **parameters)
    assert up.finish(run) == "COMPLETED"
    return run


def test_a_run_and_one_stage_of_it_again(up: Up, first: str, again: str) -> None:
    shown = up.artifacts(first)
    table = rows(shown["stages"])
    assert list(table) == STAGES
    assert {row[1] for row in table.values()} == {"ran"}
    assert "ROUGE-L" in shown["evaluation"]
    assert shown["reward-calibration"].startswith("data:image/png;base64,")

    # The link of a stage is the form of the same deployment, with this run's parameters and that stage alone.
    link = only(up, first, "ppo")
    assert link.path == f"/deployments/deployment/{up.deployment('preset/run')['id']}/run"
    parameters = json.loads(urllib.parse.parse_qs(link.query)["parameters"][0])
    assert parameters["only"] == "ppo"
    assert parameters["overrides"] == SMOKE["overrides"]
    became = {stage: row[1] for stage, row in rows(up.artifacts(again)["stages"]).items()}
    assert became == {"prepare": "cached", "sft": "cached", "judge": "cached", "reward": "cached", "ppo": "ran"}


@pytest.mark.parametrize("name", ["first", "again"])  # a stage that was computed, and one from the cache
def test_mlflow_and_prefect_lead_to_each_other(up: Up, name: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(name)
    link = re.search(r"\[run\]\(([^)]*)\)", rows(up.artifacts(run)["stages"])["sft"][6])[1]
    assert link.startswith(up.mlflow)
    answer = httpx.get(f"{up.mlflow}/api/2.0/mlflow/runs/get", params={"run_id": link.rpartition("/")[2]}).json()
    tags = {tag["key"]: tag["value"] for tag in answer["run"]["data"]["tags"]}
    parent = httpx.get(f"{up.mlflow}/api/2.0/mlflow/runs/get", params={"run_id": tags["mlflow.parentRunId"]}).json()[
        "run"
    ]["data"]["tags"]
    note = {tag["key"]: tag["value"] for tag in parent}["mlflow.note.content"]
    assert re.search(rf"\({re.escape(up.prefect)}/\S*{run}\)", note)


def test_only_says_what_is_not_in_the_cache(up: Up) -> None:
    run = up.submit("preset/run", **SMOKE | {"overrides": ["seed=77"], "only": "ppo"})
    assert up.finish(run) == "FAILED"
    message = up.api("GET", f"flow_runs/{run}")["state"]["message"]
    assert "prepare must come from the cache, but it is not there" in message


def test_a_dry_run_computes_nothing(up: Up) -> None:
    before = sorted((up.home / "runs").iterdir())
    run = up.submit("pipeline/demo", config=shipped_demo(up) | {"seed": 78}, dry_run=True)
    assert up.finish(run) == "COMPLETED"
    assert {row[1] for row in rows(up.artifacts(run)["plan"]).values()} == {"run"}
    assert sorted((up.home / "runs").iterdir()) == before


def shipped_demo(up: Up) -> dict[str, object]:
    """The form of the demo as it is filled in."""
    config: dict[str, object] = up.deployment("pipeline/demo")["parameters"]["config"]
    return config


def test_the_forms_have_groups_selects_and_help(up: Up) -> None:
    form = up.deployment("pipeline/demo")["parameter_openapi_schema"]
    config = form["definitions"]["PipelineConfig"]["properties"]
    assert config["ppo"]["$ref"].endswith("/Ppo")
    ppo = form["definitions"]["Ppo"]["properties"]
    assert ppo["kl_control"]["enum"] == ["fixed", "adaptive"]
    assert "nat" in ppo["kl_coef"]["description"]
    preset = up.deployment("preset/run")["parameter_openapi_schema"]["properties"]
    assert "imdb-sentiment" in preset["preset"]["enum"]
    assert preset["only"]["default"] == "none"


def test_deploying_again_makes_nothing_twice(up: Up, tmp_path: Path) -> None:
    def there() -> list[tuple[str, ...]]:
        """Name and id of all that a deployment makes."""
        deployments = up.api("POST", "deployments/filter", limit=100)
        rows = [("deployment", row["name"], row["id"]) for row in deployments]
        rows += [("schedule", row["name"], one["id"]) for row in deployments for one in row["schedules"]]
        for kind in ("automations", "work_pools"):
            rows += [(kind, row["name"], row["id"]) for row in up.api("POST", f"{kind}/filter", limit=100)]
        return sorted(rows)

    def deploy(*arguments: str) -> list[tuple[str, ...]]:
        done = subprocess.run(
            [sys.executable, "-m", "flows.commands.cli", "deploy", str(tmp_path / "mine.yaml"), *arguments],
            env={"PREFECT_API_URL": f"{up.prefect}/api", "HOME": str(tmp_path), "PATH": ""},
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == 0, done.stderr
        assert "pipeline/mine" in done.stdout
        return there()

    (tmp_path / "mine.yaml").write_text("preset: demo\nname: mine\nseed: 5\n")
    first = deploy()
    assert deploy() == first
    names = {kind: sorted(name for one, name, _ in first if one == kind) for kind, *_ in first}
    assert names == {
        "automations": sorted([LOST, FOUND]),
        "deployment": sorted(["run", "mine", *(config.name for config in shipped())]),
        "work_pools": ["rlhf"],
    }
    assert up.deployment("pipeline/mine")["parameters"]["config"]["seed"] == 5
    assert up.deployment("pipeline/mine")["job_variables"]["env"] == ENVIRONMENT
    scheduled = deploy("--cron", "0 0 1 1 *")
    assert {kind for kind, name, id in {*scheduled} - {*first}} == {"deployment", "schedule"}
    assert len(scheduled) == len(first) + 2
    assert deploy("--cron", "0 0 1 1 *") == scheduled
    assert deploy("--cron", "0 0 2 1 *") == scheduled
    [schedule] = up.deployment("retrain/mine")["schedules"]
    assert schedule["schedule"]["cron"] == "0 0 2 1 *"
    for name in ("retrain/mine", "pipeline/mine"):
        up.api("DELETE", f"deployments/{up.deployment(name)['id']}")


def test_files_and_functions_of_the_folder_that_it_was_started_in(up: Up) -> None:
    """By relative paths; Prefect starts a run in an empty folder."""
    examples = [{"prompt": f"What is {i} plus {i}?", "response": f"It is {2 * i}."} for i in range(60)]
    (up.project / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    (up.project / "own.py").write_text("def short(prompts, responses):\n    return [-len(r) for r in responses]\n")
    (up.project / "own_module.py").write_text((up.project / "own.py").read_text())
    changes = [
        "data.demonstrations=[own.jsonl]",
        "data.preferences=[]",
        "data.test_fraction=0.3",
        "judge=off",
        "reward=off",
    ]
    changes += ["ppo.rewards={own.py:short: 1.0}", "ppo.judges={}", "evaluate.scorers={short: own_module:short}"]
    run = up.submit("preset/run", **SMOKE | {"overrides": [*SMOKE["overrides"], *changes]})
    assert up.finish(run) == "COMPLETED", up.api("GET", f"flow_runs/{run}")["state"]
    assert rows(up.artifacts(run)["stages"])["ppo"][1] == "ran"


def test_a_second_one_says_what_is_there(up: Up) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.commands.cli", "up", "--home", str(up.home)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert up.prefect in done.stdout
    assert up.mlflow in done.stdout
    assert "already" in done.stdout


def test_a_port_that_is_taken(up: Up, tmp_path: Path) -> None:
    port = urllib.parse.urlsplit(up.mlflow).port
    done = subprocess.run(
        [sys.executable, "-m", "flows.commands.cli", "up", "--home", str(tmp_path), "--mlflow-port", str(port)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert f"--mlflow-port {port}" in done.stderr


def child(up: Up, name: str) -> int | None:
    """The process id of a program that ``rlhf up`` has started."""
    for one in psutil.Process(up.process.pid).children():
        with contextlib.suppress(psutil.Error):  # it has died, and nobody has looked yet
            if name in one.cmdline():
                return one.pid
    return None


@pytest.mark.parametrize("name", ["mlflow", "worker"])
def test_what_dies_is_started_again(up: Up, name: str) -> None:
    victim = child(up, name)
    assert victim is not None
    psutil.Process(victim).kill()
    wait_for(lambda: child(up, name) not in (None, victim), f"another {name}")
    run = up.submit("preset/run", **SMOKE)
    assert up.finish(run) == "COMPLETED"


def not_begun(up: Up) -> str:
    """A run that no worker takes by itself; its id."""
    later = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2099-01-01T00:00:00Z"}}
    deployment = up.deployment("preset/run")["id"]
    return str(up.api("POST", f"deployments/{deployment}/create_flow_run", parameters=SMOKE, state=later)["id"])


def put(up: Up, run: str, *states: str) -> None:
    """Say of a run that it is in these states, one after the other."""
    for state in states:
        up.api("POST", f"flow_runs/{run}/set_state", state={"type": state}, force=True)


def test_a_run_that_was_being_started_when_the_worker_died_is_started_again(up: Up) -> None:
    run = not_begun(up)
    put(up, run, "PENDING")
    victim = child(up, "worker")
    assert victim is not None
    psutil.Process(victim).terminate()
    assert up.finish(run) == "COMPLETED"


@pytest.fixture(scope="module")
def ended(up: Up) -> dict[str, str]:
    """Runs whose process ended before they began, by their state: made together, as it takes a minute to be sure."""
    runs = {state: not_begun(up) for state in ("PENDING", "CANCELLING")}
    with subprocess.Popen(["true"]) as process:
        pass
    up.api("PATCH", f"flow_runs/{runs['PENDING']}", infrastructure_pid=str(process.pid))
    put(up, runs["CANCELLING"], "PENDING", "CANCELLING")
    put(up, runs["PENDING"], "PENDING")
    assert up.state(runs["CANCELLING"]) == "CANCELLING"
    return runs


def test_a_run_whose_process_ended_before_it_began_is_started_again(up: Up, ended: dict[str, str]) -> None:
    """As one does that cannot ask the server, whose database is away."""
    assert up.finish(ended["PENDING"]) == "COMPLETED"


def test_a_run_that_is_cancelled_before_it_begins_does_not_stay_so(up: Up, ended: dict[str, str]) -> None:
    """Its process ends without a word to the server, as that of a run which is cancelled while it is being started."""
    assert up.finish(ended["CANCELLING"]) == "CANCELLED"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_cancelled_training_leaves_a_checkpoint_and_no_process(up: Up, processes: int) -> None:
    """Although no regular one is due. What it took is printed, and in docs/reliability.md."""
    updates = f"ppo.updates={2000 + processes}"  # a PPO of its own, and the stages before it from the cache
    changes = [updates, "ppo.checkpoint_every=1000", f"resources.processes={processes}", "ppo.episodes=8"]
    before = {*up.home.glob("work/ppo-*/metrics.jsonl")}
    run = up.submit("preset/run", **SMOKE | {"overrides": [*changes, "resources.threads=1"]})
    [journal] = wait_for(lambda: {*up.home.glob("work/ppo-*/metrics.jsonl")} - before, "an update of ppo")
    carriers = [one for one in up.tree() if one.environ().get("PREFECT__FLOW_RUN_ID") == run]
    began = time.monotonic()
    assert up.api("POST", f"flow_runs/{run}/set_state", state={"type": "CANCELLING"})["status"] == "ACCEPT"
    _, alive = psutil.wait_procs(carriers, timeout=60)
    print(f"{len(carriers)} processes of a run with {processes} were gone after {time.monotonic() - began:.1f} s")
    assert carriers
    assert not alive
    assert up.finish(run) == "CANCELLED"
    assert checkpoints.latest(journal.parent / "checkpoints") is not None
