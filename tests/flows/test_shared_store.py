"""Two machines, each with a home folder of its own, and one shared store: what one computed, the other need not."""

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

from rlhf import shared_store
from rlhf.artifacts import Store
from rlhf.shared_store import SharedStore
from rlhf.stages import STAGES
from tests.rlhf.projects import good

Rlhf = Callable[..., tuple[int, str, str]]
ALL = list(STAGES)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that all machines see."""
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


@pytest.fixture
def on(rlhf: Rlhf, tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Rlhf]:
    """The command line on a machine, by its name."""

    def machine(name: str) -> Rlhf:
        def call(*arguments: str) -> tuple[int, str, str]:
            monkeypatch.setenv("RLHF_HOME", str(tmp_path / name))
            offline = ("--set", "tracking.enabled=false") if arguments[0] == "run" else ()
            return rlhf(*arguments, "--store", f"file://{shared}", *offline)

        return call

    return machine


def plan(rlhf: Rlhf, *arguments: str) -> dict[str, dict[str, Any]]:
    code, out, error = rlhf("plan", "--json", *arguments)
    assert code == 0, error
    return {row["stage"]: row for row in json.loads(out)}


def test_a_fresh_machine_computes_nothing(on: Callable[[str], Rlhf], calls: list[str], tmp_path: Path) -> None:
    assert on("a")("run")[0] == 0
    assert calls == ALL
    rows = plan(on("b"))
    assert {row["action"] for row in rows.values()} == {"cached"}
    assert f" to fetch from file://{tmp_path}/shared" in rows["sft"]["reasons"][0]
    assert not (tmp_path / "b" / "store").exists()  # a plan fetches nothing
    code, out, error = on("b")("run")
    assert (code, error) == (0, "")
    assert "all stages are up to date" in out
    assert calls == ALL
    assert {row["reasons"] == [] for row in plan(on("b")).values()} == {True}  # it is all here now
    [run] = (tmp_path / "b" / "runs").glob("*/run.json")  # as rlhf runs and garbage collection want to know
    assert {row["cached"] for row in json.loads(run.read_text())["stages"].values()} == {True}


def test_a_fresh_machine_goes_on_from_what_the_other_did(on: Callable[[str], Rlhf], calls: list[str]) -> None:
    assert on("a")("run", "--until", "reward")[0] == 0
    calls.clear()
    assert on("b")("run", "--only", "ppo")[0] == 0
    assert calls == ["ppo"]


def test_what_one_made_anew_the_others_get(on: Callable[[str], Rlhf], calls: Any) -> None:
    assert on("a")("run")[0] == 0
    calls.clear()
    calls.change = "other"
    assert on("b")("run", "--refresh", "sft")[0] == 0
    assert calls == ["sft", "reward", "ppo", "evaluate"]
    assert on("c")("run")[0] == 0
    assert calls == ["sft", "reward", "ppo", "evaluate"]


def test_a_damaged_shared_artifact_is_computed_again_and_replaced(
    on: Callable[[str], Rlhf], calls: list[str], shared: Path
) -> None:
    assert on("a")("run")[0] == 0
    calls.clear()
    [model] = shared.glob("sft/*/*/model")
    model.write_bytes(model.read_bytes().replace(b"e", b"E", 1))
    assert on("b")("run")[0] == 0
    assert calls == ["sft"]
    assert on("c")("run")[0] == 0
    assert calls == ["sft"]


def test_what_must_come_from_the_cache_and_is_damaged_is_not_computed(
    on: Callable[[str], Rlhf], calls: list[str], shared: Path
) -> None:
    assert on("a")("run")[0] == 0
    calls.clear()
    [model] = shared.glob("sft/*/*/model")
    model.unlink()
    code, _, error = on("b")("run", "--only", "ppo")
    assert code == 2
    assert "sft must come from the cache, but it cannot be opened (missing)" in error
    assert "rlhf run --until sft" in error
    assert calls == []


@pytest.mark.parametrize("rest", [[], ["ppo", "evaluate"]])
def test_what_could_not_be_sent_is_sent_by_the_next_run(
    on: Callable[[str], Rlhf], calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest: list[str]
) -> None:
    put = SharedStore._put

    def denied(self: SharedStore, source: str, target: str) -> None:
        if "/reward/" in target:
            raise PermissionError("Access Denied")
        put(self, source, target)

    with monkeypatch.context() as patch:
        patch.setattr(SharedStore, "_put", denied)
        code, _, error = on("a")("run")
    assert code == 1
    assert f"StorageError: the shared store file://{tmp_path}/shared refuses: PermissionError: Access Denied" in error
    assert calls == ["prepare", "sft", "judge", "reward"]
    assert plan(on("a"))["reward"] == plan(on("a"))["reward"] | {"action": "cached", "reasons": []}
    assert plan(on("b"))["reward"]["action"] == "run"
    assert [stage for stage, _ in Store(tmp_path / "a").unsent()] == ["reward"]
    assert not list((tmp_path / "a" / "work").iterdir())

    assert on("a")("run", "--until", rest[-1] if rest else "reward")[0] == 0
    assert calls == ["prepare", "sft", "judge", "reward", *rest]
    assert plan(on("b"))["reward"]["action"] == "cached"
    assert Store(tmp_path / "a").unsent() == []


def test_a_store_that_is_away_stops_what_needs_it_and_nothing_else(
    on: Callable[[str], Rlhf], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert on("a")("run")[0] == 0
    again = shared_store.retry
    monkeypatch.setattr(shared_store, "retry", lambda request: again(request, sleep=lambda seconds: None))

    def away(self: SharedStore, *arguments: Any) -> Any:
        raise TimeoutError("timed out")

    monkeypatch.setattr(SharedStore, "_place", property(lambda self: (type("Away", (), {"cat_file": away})(), "")))
    assert on("a")("run")[0] == 0
    code, _, error = on("b")("plan")
    assert code == 1
    assert "does not answer: TimeoutError: timed out" in error


def test_an_existing_cache_can_be_sent(on: Callable[[str], Rlhf], rlhf: Rlhf, calls: list[str], tmp_path: Path) -> None:
    assert rlhf("run", "--home", str(tmp_path / "a"), "--set", "tracking.enabled=false")[0] == 0
    assert {row["action"] for row in plan(on("b")).values()} == {"run"}
    code, out, _ = on("a")("cache", "send")
    assert code == 0
    assert "has all 6 artifacts" in out
    assert {row["action"] for row in plan(on("b")).values()} == {"cached"}


def test_cache_send_wants_a_store(rlhf: Rlhf) -> None:
    code, _, error = rlhf("cache", "send")
    assert code == 2
    assert "--store URL" in error


@pytest.mark.parametrize("command", [["run"], ["plan"], ["up"], ["sweep", "--over", "seed=[1]"], ["validate"]])
def test_a_bad_store_is_bad_input(rlhf: Rlhf, command: list[str]) -> None:
    code, out, error = rlhf(*command, "--store", "s4://bucket")
    assert (code, out) == (2, "")
    assert "rlhf: --store (RLHF_STORE) 's4://bucket': s4:// is known to no driver of fsspec" in error


# --- a server that speaks S3, and processes


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
            [sys.executable, "-m", "flows.cli", command, *words, "--home", str(tmp_path / home), *arguments],
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
