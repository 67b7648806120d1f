"""deployments/prefect.yaml on a real server, as `prefect deploy` reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.team.heartbeats import ENVIRONMENT, FOUND, LOST
from tests.team.conftest import Up

ROOT = Path(__file__).parents[2]
POOLS = ("rlhf-docker", "rlhf-kubernetes")
NAMES = ("preset/docker", "preset/kubernetes", "retrain/nightly")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def pools(up: Up) -> Iterator[None]:
    """The work pools that the file names; of processes, as Docker's and Kubernetes's are packages of their own."""
    for name in POOLS:
        up.api("POST", "work_pools/", name=name, type="process")
    yield
    for deployment in NAMES:
        up.api("DELETE", f"deployments/{up.deployment(deployment)['id']}")
    for name in POOLS:
        up.api("DELETE", f"work_pools/{name}")


def deploy(up: Up, home: Path, **more: str) -> dict[str, dict[str, Any]]:
    """Deploy all, with more in the environment; what is on the server then."""
    done = subprocess.run(
        [
            *(Path(sys.executable).parent / "prefect", "--no-prompt"),
            *("deploy", "--all", "--prefect-file", "deployments/prefect.yaml"),
        ],
        env={
            "PREFECT_API_URL": f"{up.prefect}/api",
            "MLFLOW_TRACKING_URI": "http://mlflow.example.org:5000",
            "MLFLOW_TRACKING_USERNAME": "somebody",
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            **more,
        },
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: up.deployment(name) for name in NAMES}


def test_prefect_yaml(up: Up, pools: None, tmp_path: Path) -> None:
    for row in up.api("POST", "automations/filter"):  # of rlhf up: the file makes them, too
        up.api("DELETE", f"automations/{row['id']}")
    first = deploy(up, tmp_path)
    again = deploy(up, tmp_path, RLHF_STORE="s3://models/team")
    assert {name: one["id"] for name, one in again.items()} == {name: one["id"] for name, one in first.items()}
    for name, one in again.items():
        assert one["entrypoint"].startswith("flows.")
        assert one["pull_steps"] in ([], None), name  # the code is in the image
    assert first[NAMES[0]]["job_variables"]["env"]["RLHF_STORE"] == ""  # which is the same as none
    docker, kubernetes, nightly = (again[name] for name in NAMES)
    assert (docker["work_pool_name"], docker["job_variables"]["volumes"]) == (POOLS[0], ["rlhf-state:/state"])
    assert docker["job_variables"]["env"] == {
        **ENVIRONMENT,
        "RLHF_HOME": "/state",
        "RLHF_PROJECT": "/project",
        "RLHF_STORE": "s3://models/team",
        "MLFLOW_TRACKING_URI": "http://mlflow.example.org:5000",
        "MLFLOW_TRACKING_USERNAME": "somebody",
        "RLHF_MLFLOW_UI_URL": "",  # which is the same as none
    }
    assert (kubernetes["work_pool_name"], kubernetes["job_variables"]["namespace"]) == (POOLS[1], "rlhf")
    both = docker["job_variables"] | {"volumes": ["rlhf-state:/state", "/srv/project:/project:ro"]}
    assert (nightly["work_pool_name"], nightly["job_variables"]) == (POOLS[0], both)
    assert nightly["job_variables"]["image"] == "rlhf:cuda"
    data = nightly["parameters"]["config"]["data"]
    assert all(path.startswith("/project/") for paths in data.values() for path in paths)
    [schedule] = nightly["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("0 3 * * *", "Europe/Berlin")
    assert not schedule["active"]
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert nightly["parameters"]["config"]["name"] == "nightly"
    assert sorted(row["name"] for row in up.api("POST", "automations/filter")) == sorted([LOST, FOUND])
