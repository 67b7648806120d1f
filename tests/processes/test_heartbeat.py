"""Runs of machines that no reaper sees: who is not heard of any more becomes Crashed, and nobody else stays it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.team.deployments import POOL, apply
from flows.team.heartbeats import (
    ALIVE_HEARTBEATS,
    FOUND,
    HEARTBEAT_SECONDS,
    LOST,
    SERVER_ENVIRONMENT,
    look_after_runs,
)
from flows.team.server import free_port
from rlhf.config.pipeline import PipelineConfig
from tests.faults import workload
from tests.team.conftest import Up, wait_for
from tests.team.postgres import needs_postgres, postgres

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), needs_postgres]

DEAD = 45.0  # seconds; Prefect has no heartbeats that are closer than 30 to each other
LATE = 30.0  # seconds that it may take longer on a busy machine
ROOT = Path(__file__).parents[2]


class Team:
    """A Prefect server with our deployments; nobody looks after its runs but itself."""

    def __init__(self, folder: Path, database: str) -> None:
        self._folder, self._port, self._database = folder, free_port(), database
        self.prefect = f"http://127.0.0.1:{self._port}"
        self.api_url = f"{self.prefect}/api"
        ours = ("PREFECT", "RLHF", "MLFLOW_TRACKING")
        others = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.environment = {**others, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PREFECT_API_URL": self.api_url}

    def start(self) -> None:
        """Start the server; it answers then."""
        environment = SERVER_ENVIRONMENT | {  # as rlhf up and compose start it: a slot outlives the server
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self._database,
        }
        self.process = self.run("server", environment, "server", "start", "--port", str(self._port))

        def answers() -> bool:
            with suppress(httpx.HTTPError):
                return httpx.get(f"{self.api_url}/health").is_success
            return False

        wait_for(answers, "the server")

    def run(self, name: str, environment: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command of Prefect's, with a folder and a log of that name."""
        (self._folder / name).mkdir(exist_ok=True)
        environment = {**self.environment, "PREFECT_HOME": str(self._folder / name / "prefect"), **environment}
        command = [sys.executable, "-m", "prefect", *arguments]
        with (self._folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self._folder / name)

    @contextmanager
    def client(self) -> Iterator[None]:
        """Prefect's client in this process talks to it."""
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: self.api_url}):
            yield

    def api(self, method: str, path: str, **body: Any) -> Any:
        """What its API answers."""
        return Up.api(self, method, path, **body)  # type: ignore[arg-type]  # it needs the address alone

    def log(self, name: str) -> str:
        """The end of what a command of that name has said."""
        return "\n".join((self._folder / f"{name}.log").read_text(errors="replace").splitlines()[-40:])

    def states(self, run: str) -> list[str]:
        """The types of the states that a run had, in order."""
        rows = self.api("GET", f"flow_run_states/?flow_run_id={run}")
        return [row["type"] for row in sorted(rows, key=lambda row: row["timestamp"])]

    def state(self, run: str) -> str:
        """The type of the present one."""
        return str(self.api("GET", f"flow_runs/{run}")["state_type"])


class Machine:
    """Another machine: a worker that someone started by hand, with a home folder of its own, and a run on it."""

    def __init__(self, team: Team, name: str, pipeline: str) -> None:
        team.api("POST", f"work_pools/{POOL}/queues", name=name)  # its own, so that no other worker gets the run
        deployment = team.api("GET", f"deployments/name/pipeline/{pipeline}")["id"]
        made = team.api(
            "POST",
            f"deployments/{deployment}/create_flow_run",
            work_queue_name=name,
            state={"type": "SCHEDULED"},
        )
        self.run: str = made["id"]
        home = {"RLHF_HOME": str(team._folder / name / "home"), "PREFECT_WORKER_QUERY_SECONDS": "2"}
        options = ("--pool", POOL, "--work-queue", name, "--name", name)
        self._worker = team.run(name, home, "worker", "start", *options)

    def tree(self) -> list[psutil.Process]:
        """The worker and the processes of its run."""
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(self._worker.pid)
            return [top, *top.children(recursive=True)]
        return []

    def lose_power(self) -> None:
        """Kill -9 of the worker and of all that it started."""
        for one in self.tree():
            with suppress(psutil.Error):
                one.kill()
        self._worker.wait()


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """A server whose patience is short, with a pipeline that takes as long as anyone waits, and one that ends."""
    folder = tmp_path_factory.mktemp("heartbeat")
    workload.write(folder)
    configs = []
    for name, updates in (("long", 100_000), ("short", 100)):
        config = workload.config(folder, name).model_dump(mode="json")
        config["name"], config["ppo"]["updates"], config["tracking"]["enabled"] = name, updates, False
        configs.append(PipelineConfig.model_validate(config))
    # As teams have it: on a busy machine, the server's SQLite stays locked for a minute now and then, longer than DEAD.
    with postgres() as database:
        team = Team(folder, database.url.replace("postgresql", "postgresql+asyncpg"))
        team.start()
        try:
            with team.client():
                apply(configs)
                look_after_runs(DEAD)
            yield team
        finally:
            team.process.kill()
            team.process.wait()


@contextmanager
def machines(team: Team, *names: str, pipeline: str = "long") -> Iterator[list[Machine]]:
    """Machines of which each is in the middle of a run."""
    with ExitStack() as stack:
        made = []
        for name in names:
            made.append(Machine(team, name, pipeline))
            stack.callback(made[-1].lose_power)
        for one in made:
            wait_for(lambda run=one.run: team.state(run) == "RUNNING", "a run to begin")
        time.sleep(5.0)  # for the first heartbeat to be there
        try:
            yield made
        except AssertionError:  # what a run of CI leaves behind is its output alone
            for name, one in zip(names, made, strict=True):
                print(f"{name}: {team.states(one.run)}, {len(one.tree())} processes", team.log(name), sep="\n")
            print("server", team.log("server"), sep="\n")
            raise


def test_deploying_again_makes_no_second_automation(team: Team) -> None:
    with team.client():
        first, again = look_after_runs(DEAD), look_after_runs(DEAD)
    rows = team.api("POST", "automations/filter")
    assert first == again == {row["name"]: row["id"] for row in rows}
    assert sorted(row["name"] for row in rows) == sorted([LOST, FOUND])
    updated = {row["name"]: row["updated"] for row in rows}
    team.api("POST", "automations/", **{name: rows[0][name] for name in ("name", "trigger", "actions")})
    with team.client():
        assert set(look_after_runs(DEAD)) == {LOST, FOUND}
        assert len(team.api("POST", "automations/filter")) == 2  # one that is there twice is there once again
        look_after_runs(DEAD + 1.0)  # what differs is changed
        look_after_runs(DEAD)
    later = {row["name"]: row["updated"] for row in team.api("POST", "automations/filter")}
    assert later[LOST] != updated[LOST]


def test_who_is_not_heard_of_is_crashed_and_who_is_again_is_not(team: Team) -> None:
    with machines(team, "dying", "living", "silent") as (dying, living, silent):
        dying.lose_power()
        began = time.monotonic()
        asleep = silent.tree()
        for one in asleep:
            one.suspend()
        for run in (dying.run, silent.run):
            wait_for(lambda run=run: team.state(run) == "CRASHED", "a run to be missed", DEAD + LATE)
        print(f"missed {time.monotonic() - began:.0f} s after kill -9, with {DEAD:.0f} s of patience")
        assert team.api("GET", f"flow_runs/{dying.run}")["state"]["message"] == "Nothing was heard of it for 45 s."
        for one in asleep:
            one.resume()
        seconds = (ALIVE_HEARTBEATS + 1) * HEARTBEAT_SECONDS + LATE  # one may come before the server knows of Crashed
        wait_for(lambda: team.state(silent.run) == "RUNNING", "it to be heard of again", seconds)
        assert team.states(silent.run)[-3:] == ["RUNNING", "CRASHED", "RUNNING"]
        assert team.state(dying.run) == "CRASHED"
        assert "CRASHED" not in team.states(living.run)
        assert team.state(living.run) == "RUNNING"


def test_after_an_outage_of_the_server(team: Team) -> None:
    """It is longer than the patience. Who died in it is found; who lives waits for the server, and ends well."""
    with machines(team, "unlucky", "lucky", pipeline="short") as (unlucky, lucky):
        team.process.kill()
        team.process.wait()
        unlucky.lose_power()
        time.sleep(DEAD + 75.0)  # Prefect by itself remembers for a minute for whom it was waiting
        team.start()
        wait_for(lambda: team.state(unlucky.run) == "CRASHED", "the dead run to be missed", DEAD + LATE)
        wait_for(lambda: team.state(lucky.run) == "COMPLETED", "the other to end")
        print("the run that lived was", *team.states(lucky.run))
        assert team.state(unlucky.run) == "CRASHED"
