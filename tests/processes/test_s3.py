"""Several machines and one S3 bucket, of a server of our own: what one computed, the others need not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rlhf.stages import STAGES
from tests.rlhf.projects import good

Rlhf = Callable[..., tuple[int, str, str]]
ALL = list(STAGES)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a folder of a bucket, on a server of this machine; the environment is what its clients need."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "team",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    client.close()
    yield "s3://models/team"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


def test_what_s3_refuses_is_said_at_once(bucket: str, rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("tried again"))
    code, _, error = rlhf("plan", "--store", "s3://no-such-bucket/x")
    assert code == 1
    assert "the shared store s3://no-such-bucket/x is not there" in error
    assert "NoSuchBucket" in error
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    code, _, error = rlhf("plan", "--store", bucket)
    assert code == 1
    assert f"the shared store {bucket} refuses: " in error


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_s3(bucket: str, prefect_api: str, tmp_path: Path) -> None:
    """The whole pipeline on one machine; a fresh one gets the same bytes; what that one makes anew replaces them."""
    project = _made(tmp_path / "project")
    (project / "luck.py").write_text(
        "import os\ndef luck(prompts, responses):\n    return [float(os.environ['LUCK'])] * len(prompts)\n"
    )
    settings = ["sft.max_steps=2", "reward.max_steps=2", "ppo.updates=1", "tracking.enabled=false"]
    settings += [f"evaluate.scorers.luck={project}/luck.py:luck"]  # another result for the same key
    words = [str(good(project)), "--json", "--store", bucket, *(w for text in settings for w in ("--set", text))]

    def rlhf(home: str, command: str, *arguments: str, luck: int = 1) -> dict[str, dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-m", "flows.commands.cli", command, *words, "--home", str(tmp_path / home), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "LUCK": str(luck)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout)
        return {row["stage"]: row for row in (found["stages"] if command == "run" else found)}

    def files(home: str) -> dict[str, bytes]:
        root = tmp_path / home / "store"
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.*") if path.is_file()}

    def computed(home: str) -> list[str]:
        """What the last run of a machine computed."""
        record = max((tmp_path / home / "runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime_ns)
        return [stage for stage, row in json.loads(record.read_text())["stages"].items() if not row["cached"]]

    rlhf("a", "run")
    assert computed("a") == ALL
    assert {row["action"] for row in rlhf("b", "plan").values()} == {"cached"}
    assert files("b") == {}
    rlhf("b", "run")
    assert computed("b") == []
    ours, theirs = files("a"), files("b")
    assert [name for name in ours if not name.endswith("manifest.json") and ours[name] != theirs.get(name)] == []
    assert ours.keys() == theirs.keys()
    assert len([name for name in ours if name.endswith("model.safetensors")]) >= 3

    assert rlhf("b", "run", "--refresh", "evaluate", luck=2)["evaluate"]["metrics"]["evaluate/ppo/luck"] == 2
    assert computed("b") == ["evaluate"]
    assert rlhf("c", "run")["evaluate"]["metrics"]["evaluate/ppo/luck"] == 2
    assert computed("c") == []
    assert rlhf("a", "plan")["evaluate"]["action"] == "cached"  # and it keeps its own


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
