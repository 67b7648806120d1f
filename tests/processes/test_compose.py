"""docker/: the image is built as a linter wants it, and compose's commands work together with compose's environment.

No container is started: each service's command runs as a process of this machine, with the hosts of compose.yaml
being this machine, and its volumes folders of the test.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from flows.team.heartbeats import ENVIRONMENT, SERVER_ENVIRONMENT
from flows.team.server import free_port
from tests.team.conftest import wait_for
from tests.team.postgres import needs_postgres, postgres

DOCKER = Path(__file__).parents[2] / "docker"
TOOLS = Path(sys.executable).parent
SECRETS = {
    "POSTGRES_PASSWORD": "not-asked-for-here",
    "PREFECT_LOGIN": "team:a-good-password",
    "MLFLOW_USER": "admin",
    "MLFLOW_PASSWORD": "another-good-password",
    "MLFLOW_SECRET_KEY": "something-random",
}
HOST = "mlflow.example.org"  # by which people reach MLflow
REFERENCE = re.compile(r"\$\{(\w+)(?::([-?])((?:[^{}]|\{[^{}]*\})*))?\}")  # the default may be one, too


def interpolated(text: str, values: dict[str, str]) -> str:
    """Compose's ${NAME:-default} and ${NAME:?error} in a text.

    Raises:
        ValueError: a value that must be there is not.
    """

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if values.get(name):
            return values[name]
        if kind == "-":
            return interpolated(rest, values)
        raise ValueError(f"{name} {rest}")

    return REFERENCE.sub(value, text)


def services(text: str, values: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The services of a compose file, by name."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(interpolated(text, values))["services"]
    return found


def test_the_dockerfile_has_nothing_that_a_linter_minds() -> None:
    done = subprocess.run([TOOLS / "hadolint", DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_image_is_of_what_is_there_and_runs_as_nobody_special() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    copies = [line.split() for line in lines if line.startswith("COPY") and "--from" not in line]
    sources = [name for words in copies for name in words[1:-1]]
    taken = [line[1:] for line in (DOCKER.parent / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(sources) == sorted(taken)
    assert all((DOCKER.parent / name).exists() for name in sources)
    last = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM")) :]
    assert "USER 10001" in last


def test_a_secret_that_is_not_given_is_an_error() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    assert set(services(text, SECRETS)) == {"postgres", "prefect", "mlflow", "deploy", "worker"}
    for name in SECRETS:
        with pytest.raises(ValueError, match=name):
            services(text, {**SECRETS, name: ""})
    example = {line.split("=")[0] for line in (DOCKER / "example.env").read_text().splitlines() if "=" in line}
    assert set(SECRETS) <= example
    assert {*re.findall(r"\$\{(\w+)", text)} <= {name.removeprefix("# ") for name in example}


def test_one_name_of_mlflow_is_enough() -> None:
    text = (DOCKER / "compose.yaml").read_text()

    def told(**more: str) -> tuple[str, str, str]:
        found = services(text, SECRETS | more)
        server, worker = found["mlflow"]["environment"], found["worker"]["environment"]
        hosts = server["MLFLOW_SERVER_ALLOWED_HOSTS"].rpartition(",")[2]
        return hosts, server["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"], worker["RLHF_MLFLOW_UI_URL"]

    assert told() == ("localhost", "http://localhost,https://localhost", "http://localhost:5000")
    assert told(MLFLOW_HOST="ml:81") == ("ml:81", "http://ml:81,https://ml:81", "http://ml:81")
    assert told(MLFLOW_HOST="ml", MLFLOW_UI_URL="https://ml") == ("ml", "http://ml,https://ml", "https://ml")


def test_the_worker_and_mlflow_have_what_a_bucket_and_a_hub_ask_for() -> None:
    given = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": "http://c"}
    found = services((DOCKER / "compose.yaml").read_text(), SECRETS | given | {"HF_TOKEN": "d"})
    assert found["mlflow"]["environment"].items() >= given.items()
    assert found["worker"]["environment"].items() >= (given | {"HF_TOKEN": "d"}).items()


def test_the_server_and_the_runs_know_of_heartbeats() -> None:
    found = services((DOCKER / "compose.yaml").read_text(), SECRETS)
    assert found["prefect"]["environment"].items() >= SERVER_ENVIRONMENT.items()
    assert found["worker"]["environment"].items() >= ENVIRONMENT.items()


class Services:
    """Commands of compose.yaml as processes, started in the order that they wait for each other."""

    def __init__(self, postgres: str, folder: Path, settings: dict[str, str]) -> None:
        ports = {"postgres:5432": str(urlsplit(postgres).port)}
        ports |= {name: str(free_port()) for name in ("prefect:4200", "mlflow:5000", "localhost:8080")}
        self.prefect, self.mlflow = (f"http://127.0.0.1:{ports[name]}" for name in ("prefect:4200", "mlflow:5000"))
        text = (DOCKER / "compose.yaml").read_text()
        for name, port in ports.items():
            text = text.replace(name, f"127.0.0.1:{port}").replace(f'"{name.split(":")[1]}"', f'"{port}"')
        self._login = folder / "mlflow-login.ini"
        login = (DOCKER / "mlflow-login.ini").read_text()
        self._login.write_text(login.replace("postgres:5432", f"127.0.0.1:{ports['postgres:5432']}"))
        self._folder = folder
        self.all = services(text.replace("/etc/mlflow-login.ini", str(self._login)), SECRETS | settings)
        self._running: list[subprocess.Popen[bytes]] = []

    def environment(self, name: str) -> dict[str, str]:
        """What a service's container has."""
        state = self._folder / name
        (state / "project").mkdir(parents=True, exist_ok=True)
        image = {"PATH": f"{TOOLS}:{os.environ['PATH']}", "HOME": str(state), "RLHF_HOME": str(state)}
        image |= {"PREFECT_HOME": str(state / "prefect"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(DOCKER.parent)}
        own = {key: value.replace("/state", str(state)) for key, value in self.all[name]["environment"].items()}
        return image | own | ({"RLHF_PROJECT": str(state / "project")} if "RLHF_PROJECT" in own else {})

    def start(self, name: str) -> None:
        """Start a service; it is healthy, or has ended well, afterwards."""
        service, environment = self.all[name], self.environment(name)
        with (self._folder / f"{name}.log").open("wb") as log:
            where = {"env": environment, "cwd": self._folder / name / "project", "stdout": log, "stderr": log}
            process = subprocess.Popen(service["command"], **where)
        self._running.append(process)
        if "healthcheck" not in service:
            assert process.wait(timeout=240) == 0, (self._folder / f"{name}.log").read_text()
            return
        kind, *check = service["healthcheck"]["test"]
        assert kind == "CMD"

        def healthy() -> bool:
            assert process.poll() is None, (self._folder / f"{name}.log").read_text()
            well = subprocess.run(check, env=environment, capture_output=True).returncode == 0
            time.sleep(0 if well else 1)  # a check starts an interpreter, which takes the service's time
            return well

        wait_for(healthy, f"{name} to be healthy")

    def stop(self) -> None:
        """End what runs, the last first, as compose does."""
        for process in reversed(self._running):
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket of a server on this machine: boto3's resource, and the settings with which MLflow keeps files there."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    login = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "team", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in login.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="mlflow")
    yield client, login | {"MLFLOW_ARTIFACTS": "s3://mlflow/files"}
    client.close()
    server.stop()


@pytest.fixture
def running(tmp_path: Path, bucket: Any) -> Iterator[Services]:
    with postgres() as server:
        statements = (DOCKER / "databases.sql").read_text()
        subprocess.run(["psql", server.url, "-q"], input=statements, text=True, check=True)
        found = Services(server.url, tmp_path, bucket[1] | {"MLFLOW_HOST": HOST})
        try:
            for name in ("prefect", "mlflow", "deploy", "worker"):
                found.start(name)
            yield found
        finally:
            found.stop()


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_postgres
def test_a_run_by_the_worker(running: Services, bucket: Any) -> None:
    assert httpx.post(f"{running.prefect}/api/flows/count").status_code == 401
    assert httpx.get(f"{running.mlflow}/api/2.0/mlflow/experiments/get?experiment_id=0").status_code == 401
    token = base64.b64encode(SECRETS["PREFECT_LOGIN"].encode()).decode()
    with httpx.Client(base_url=f"{running.prefect}/api/", headers={"Authorization": f"Basic {token}"}) as prefect:
        deployment = prefect.get("deployments/name/preset/run").json()["id"]
        parameters = {"preset": "demo", "size": "smoke", "overrides": ["resources.threads=1"]}
        made = prefect.post(f"deployments/{deployment}/create_flow_run", json={"parameters": parameters}).json()["id"]

        def state() -> Any:
            return prefect.get(f"flow_runs/{made}").json()["state"]

        wait_for(lambda: state()["type"] in ("COMPLETED", "FAILED", "CRASHED"), "the end of the run")
        assert state()["type"] == "COMPLETED", state()
        query = {"artifacts": {"flow_run_id": {"any_": [made]}, "key": {"any_": ["stages"]}}}
        [stages] = prefect.post("artifacts/filter", json=query).json()
        links = re.findall(r"\[run\]\(([^)]*)\)", stages["data"])
        assert links
        assert all(link.startswith(f"http://{HOST}/#/experiments/") for link in links)
    login = (SECRETS["MLFLOW_USER"], SECRETS["MLFLOW_PASSWORD"])
    with httpx.Client(base_url=f"{running.mlflow}/api/2.0/mlflow/", auth=login) as mlflow:
        experiment = mlflow.get("experiments/get-by-name", params={"experiment_name": "rlhf"}).json()["experiment"]
        body = {"experiment_ids": [experiment["experiment_id"]]}
        runs = mlflow.post("runs/search", json=body).json()["runs"]
        for name, scheme, code in ((HOST, "http", 200), (HOST, "https", 200), ("example.org", "http", 403)):
            browser = {"Host": HOST, "Origin": f"{scheme}://{name}"}
            assert mlflow.post("runs/search", json=body, headers=browser).status_code == code
        assert mlflow.post("runs/search", json=body, headers={"Host": "example.org"}).status_code == 403
    assert {"demo/sft", "demo/ppo", "demo/evaluate"} <= {run["info"]["run_name"] for run in runs}
    assert all(run["info"]["artifact_uri"].startswith("mlflow-artifacts:") for run in runs)
    kept = [row["Key"] for row in bucket[0].list_objects_v2(Bucket="mlflow")["Contents"]]
    assert all(key.startswith("files/") for key in kept)
    assert any(key.endswith("/report.html") for key in kept)
