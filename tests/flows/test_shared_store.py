"""Two machines, each with a home folder of its own, and one shared store: what one computed, the other need not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.stages import STAGES
from rlhf.store import shared as shared_store
from rlhf.store.artifacts import Store
from rlhf.store.shared import SharedStore

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


@pytest.fixture
def a_has_run(on: Callable[[str], Rlhf], stood_in: Path, calls: list[str], tmp_path: Path) -> None:
    """Machine a has run the pipeline, and the shared store has it all."""
    shutil.copytree(stood_in, tmp_path / "a")
    assert on("a")("cache", "send")[0] == 0
    assert calls == []


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


@pytest.mark.usefixtures("a_has_run")
def test_what_one_made_anew_the_others_get(on: Callable[[str], Rlhf], calls: Any) -> None:
    calls.change = "other"
    assert on("b")("run", "--refresh", "sft")[0] == 0
    assert calls == ["sft", "reward", "ppo", "evaluate"]
    assert on("c")("run")[0] == 0
    assert calls == ["sft", "reward", "ppo", "evaluate"]


@pytest.mark.usefixtures("a_has_run")
def test_a_damaged_shared_artifact_is_computed_again_and_replaced(
    on: Callable[[str], Rlhf], calls: list[str], shared: Path
) -> None:
    [model] = shared.glob("sft/*/*/model")
    model.write_bytes(model.read_bytes().replace(b"e", b"E", 1))
    assert on("b")("run")[0] == 0
    assert calls == ["sft"]
    assert on("c")("run")[0] == 0
    assert calls == ["sft"]


@pytest.mark.usefixtures("a_has_run")
def test_what_must_come_from_the_cache_and_is_damaged_is_not_computed(
    on: Callable[[str], Rlhf], calls: list[str], shared: Path
) -> None:
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


@pytest.mark.usefixtures("a_has_run")
def test_a_store_that_is_away_stops_what_needs_it_and_nothing_else(
    on: Callable[[str], Rlhf], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = shared_store.retry
    monkeypatch.setattr(shared_store, "retry", lambda request: again(request, sleep=lambda seconds: None))

    def away(self: SharedStore, *arguments: Any) -> Any:
        raise TimeoutError("timed out")

    monkeypatch.setattr(SharedStore, "_place", property(lambda self: (type("Away", (), {"cat_file": away})(), "")))
    assert on("a")("run")[0] == 0
    code, _, error = on("b")("plan")
    assert code == 1
    assert "does not answer: TimeoutError: timed out" in error


def test_an_existing_cache_can_be_sent(
    on: Callable[[str], Rlhf], stood_in: Path, calls: list[str], tmp_path: Path
) -> None:
    shutil.copytree(stood_in, tmp_path / "a")
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
