"""The pipeline's promises about its cache: computed once, recomputed when and only when something changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rlhf.champions import ledger as champion
from rlhf.champions.ledger import Contender
from rlhf.config.yaml_files import load
from rlhf.stages import STAGES

Rlhf = Callable[..., tuple[int, str, str]]
ALL = list(STAGES)


@pytest.fixture
def rlhf(rlhf: Rlhf) -> Rlhf:
    """The command line, with runs that stay on this machine: shipping them has tests of its own."""

    def call(*arguments: str) -> tuple[int, str, str]:
        offline = ("--set", "tracking.enabled=false") if arguments[0] == "run" else ()
        return rlhf(*arguments, *offline)

    return call


@pytest.fixture
def done(rlhf: Rlhf, run_once: Path) -> Rlhf:
    """A pipeline that has run once."""
    return rlhf


def plan(rlhf: Rlhf, *arguments: str) -> dict[str, dict[str, Any]]:
    code, out, error = rlhf("plan", "--json", *arguments)
    assert code == 0, error
    return {row["stage"]: row for row in json.loads(out)}


def artifact(home: Path, stage: str) -> Path:
    [path] = (home / "store" / stage).iterdir()
    return path


def test_a_second_run_computes_nothing(rlhf: Rlhf, calls: list[str], home: Path) -> None:
    code, _, error = rlhf("run")
    assert (code, error) == (0, "")
    assert calls == ALL
    calls.clear()
    code, out, _ = rlhf("run")
    assert code == 0
    assert "all stages are up to date" in out
    assert calls == []
    assert len(list((home / "runs").iterdir())) == 1


def again(out: str) -> list[str]:
    """The commands that the end of a run proposes."""
    line = next(line for line in out.splitlines() if line.startswith("Again:"))
    return [command.strip() for command in line.removeprefix("Again:").split("    ") if command.strip()]


def test_what_to_type_next_is_about_what_was_run(done: Rlhf, tmp_path: Path) -> None:
    offline = "--set tracking.enabled=false"
    assert again(done("run")[1]) == [
        f"rlhf plan {offline} --set ppo.kl_coef=0.1", f"rlhf run {offline} --only ppo", "rlhf runs",
    ]  # fmt: skip
    (tmp_path / "my own.yaml").write_text(done("show", "demo", "--size", "smoke", "--set", "ppo=off")[1])
    out = done("run", str(tmp_path / "my own.yaml"), "--until", "sft")[1]
    words = f"'{tmp_path / 'my own.yaml'}' {offline}"
    assert again(out) == [f"rlhf plan {words} --set seed=2", f"rlhf run {words} --only sft", "rlhf runs"]


def test_a_changed_value_runs_its_stage_and_what_follows(done: Rlhf, calls: list[str]) -> None:
    rows = plan(done, "--set", "ppo.kl_coef=0.1")
    assert [name for name, row in rows.items() if row["action"] == "run"] == ["ppo", "evaluate"]
    assert rows["ppo"]["reasons"] == [f"config.ppo.kl_coef: {load().ppo.kl_coef} -> 0.1"]
    assert rows["evaluate"]["reasons"] == ["input ppo: will be made anew"]
    assert done("run", "--set", "ppo.kl_coef=0.1")[0] == 0
    assert calls == ["ppo", "evaluate"]


@pytest.mark.parametrize(
    ("library", "stages"), [("numpy", ALL[1:]), ("datasets", ["prepare", "sft", "judge", "reward"])]
)
def test_another_version_of_a_library_runs_the_stages_that_use_it(
    done: Rlhf, monkeypatch: pytest.MonkeyPatch, library: str, stages: list[str]
) -> None:
    monkeypatch.setattr("rlhf.cache.plan._version", lambda name: "0.1" if name == library else version(name))
    rows = plan(done)
    named = [stage for stage, row in rows.items() if any(f"library {library}" in reason for reason in row["reasons"])]
    assert named == stages


def test_what_does_not_change_numbers_changes_no_key(done: Rlhf, tmp_path: Path) -> None:
    overrides = ("ppo.micro_batch_tokens=999", "sft.checkpoint_every=7", "resources.threads=1", "tracking.experiment=x")
    rows = plan(done, *(word for text in overrides for word in ("--set", text)))
    assert {row["action"] for row in rows.values()} == {"cached"}


def test_an_equal_result_stops_the_recomputation(done: Rlhf, calls: list[str]) -> None:
    assert done("run", "--refresh", "sft")[0] == 0
    assert calls == ["sft"]


def test_another_result_goes_on(done: Rlhf, calls: Any) -> None:
    calls.change = "other"
    assert done("run", "--refresh", "sft")[0] == 0
    assert calls == ["sft", "reward", "ppo", "evaluate"]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": shutil.rmtree,
    "is missing": lambda path: next(file for file in path.iterdir() if file.name != "manifest.json").unlink(),
    "has changed": lambda path: (path / "metrics.jsonl").write_bytes(
        (path / "metrics.jsonl").read_bytes().replace(b"loss", b"lass", 1)
    ),
    "bytes, not": lambda path: (path / "metrics.jsonl").write_bytes(b""),
    "manifest.json": lambda path: (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:-9]),
}
# Each damage to all stages, in two runs: every two stages are in different ones of some damage.
HALVES = [set(half) for half in combinations(ALL, 3) if ALL[0] in half][::2]


@pytest.mark.parametrize(("words", "half"), list(zip(DAMAGES, HALVES, strict=True)), ids=list(DAMAGES))
def test_a_damaged_artifact_is_named_and_only_its_stage_recomputed(
    done: Rlhf, calls: list[str], home: Path, tmp_path: Path, words: str, half: set[str]
) -> None:
    for stage in ALL:
        path = artifact(home, stage)
        shutil.copytree(path, tmp_path / stage)
        DAMAGES[words](path)
        rows = plan(done)
        assert [name for name, row in rows.items() if row["action"] == "run"] == [stage]
        assert words in rows[stage]["reasons"][0]
        shutil.rmtree(path, ignore_errors=True)
        shutil.move(tmp_path / stage, path)
    for stages in ([stage for stage in ALL if stage in half], [stage for stage in ALL if stage not in half]):
        for stage in stages:
            DAMAGES[words](artifact(home, stage))
        calls.clear()
        assert done("run")[0] == 0
        assert calls == stages


def test_without_prefects_records_the_store_still_serves(done: Rlhf, calls: list[str], home: Path) -> None:
    shutil.rmtree(home / "results")
    assert done("run", "--set", "ppo.kl_coef=0.1")[0] == 0
    assert calls == ["ppo", "evaluate"]


def test_a_garbled_record_of_prefect_is_a_miss(done: Rlhf, calls: list[str], home: Path) -> None:
    for record in (home / "results").iterdir():
        record.write_text(record.read_text()[:-20])
    assert done("run", "--set", "ppo.kl_coef=0.1")[0] == 0
    assert calls == ["ppo", "evaluate"]


def test_a_home_folder_can_be_moved(done: Rlhf, calls: list[str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(home, home.parent / "moved")
    monkeypatch.setenv("RLHF_HOME", str(home.parent / "moved"))
    shutil.rmtree(home.parent / "moved" / "store" / "ppo")
    assert done("run")[0] == 0
    assert calls == ["ppo"]


def test_only_computes_one_stage_anew(done: Rlhf, calls: list[str]) -> None:
    assert done("run", "--only", "ppo")[0] == 0
    assert calls == ["ppo"]


def test_from_computes_the_rest_anew(done: Rlhf, calls: list[str]) -> None:
    assert done("run", "--from", "reward")[0] == 0
    assert calls == ["reward", "ppo", "evaluate"]


def test_until_stops(rlhf: Rlhf, calls: list[str]) -> None:
    assert rlhf("run", "--until", "judge")[0] == 0
    assert calls == ["prepare", "sft", "judge"]


@pytest.mark.parametrize("option", ["--only", "--from"])
def test_what_must_come_from_the_cache_is_not_computed(rlhf: Rlhf, calls: list[str], home: Path, option: str) -> None:
    code, _, error = rlhf("run", option, "ppo")
    assert code == 2
    assert "prepare must come from the cache" in error
    assert "rlhf run --until prepare" in error
    assert calls == []
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "sft", "--until", "ppo"), "--only cannot be combined"),
        (("--from", "ppo", "--until", "sft"), "--from ppo comes after --until sft"),
        (("--only", "judge", "--set", "judge=off"), "--only judge: that stage is off"),
    ],
)
def test_selections_that_make_no_sense(rlhf: Rlhf, arguments: tuple[str, ...], message: str) -> None:
    code, _, error = rlhf("run", *arguments)
    assert code == 2
    assert message in " ".join(error.split())


def test_a_stage_that_is_off_is_left_out(rlhf: Rlhf, calls: list[str]) -> None:
    assert rlhf("run", "--set", "judge=off")[0] == 0
    assert calls == [name for name in ALL if name != "judge"]


def test_a_failing_stage_publishes_nothing_and_the_next_run_goes_on(rlhf: Rlhf, calls: Any, home: Path) -> None:
    calls.fail = "reward"
    code, _, error = rlhf("run")
    assert (code, error.strip()) == (2, "rlhf: reward was told to fail")
    assert not (home / "store" / "reward").exists()
    calls.fail = ""
    calls.clear()
    assert rlhf("run")[0] == 0
    assert calls == ["reward", "ppo", "evaluate"]
    statuses = [json.loads(path.read_text())["status"] for path in sorted((home / "runs").glob("*/run.json"))]
    assert sorted(statuses) == ["done", "failed"]


def test_moving_the_data_changes_nothing_and_editing_it_does(rlhf: Rlhf, calls: list[str], tmp_path: Path) -> None:
    def config(folder: str, text: str) -> str:
        place = tmp_path / folder
        place.mkdir()
        (place / "d.jsonl").write_text(text)
        (place / "p.yaml").write_text(
            "name: mine\nmodel: {init: random}\njudge: off\nreward: off\nppo: off\nevaluate: off\n"
            "data: {demonstrations: d.jsonl}\n"
        )
        return str(place / "p.yaml")

    row = '{"prompt": "a", "response": "b"}\n'
    assert rlhf("run", config("here", row))[0] == 0
    assert {entry["action"] for entry in plan(rlhf, config("there", row)).values()} == {"cached"}
    edited = plan(rlhf, config("edited", row + row.replace("a", "c")))
    assert edited["prepare"]["reasons"][0].startswith("data.demonstrations[0] d.jsonl: ")
    assert edited["prepare"]["action"] == "run"


def test_cache_verbs(done: Rlhf, home: Path) -> None:
    code, out, _ = done("cache", "ls", "--json")
    assert code == 0
    assert {row["stage"] for row in json.loads(out)} == set(ALL)
    assert done("cache", "verify")[0] == 0
    (artifact(home, "sft") / "model").write_text("damaged")
    code, out, _ = done("cache", "verify")
    assert code == 1
    assert "corrupt: model" in out
    assert done("run", "--set", "ppo.kl_coef=0.1")[0] == 0
    code, out, _ = done("cache", "gc", "--keep", "1")
    assert code == 0
    assert len(list((home / "store" / "ppo").iterdir())) == 1
    assert {row["action"] for row in plan(done, "--set", "ppo.kl_coef=0.1").values()} == {"cached"}


def test_gc_keeps_the_champion(done: Rlhf, home: Path) -> None:
    held = {path.parent.name: path.name for path in (home / "store").glob("*/*")}
    champion.promote(home, "demo", Contender("run", held), over=None, who="ann", why=())
    assert done("run", "--set", "ppo.kl_coef=0.1")[0] == 0
    assert done("cache", "gc", "--keep", "1")[:2] == (0, "0 deleted, freed 0 B\n")
    # Another one takes its place: one can go back, so that it stays nevertheless.
    other = Contender("other", held | {"ppo": "x", "evaluate": "y"})
    champion.promote(home, "demo", other, over=Contender("run", held), who="ann", why=())
    assert done("cache", "gc", "--keep", "1")[:2] == (0, "0 deleted, freed 0 B\n")
    (home / "champions" / "demo.json").write_text("{}")
    code, out, error = done("cache", "gc", "--keep", "1")
    assert (code, out) == (1, "")
    assert "demo.json is damaged" in " ".join(error.split())
    assert len(list((home / "store" / "ppo").iterdir())) == 2


def test_runs_are_listed(done: Rlhf) -> None:
    code, out, _ = done("runs", "--json")
    [record] = json.loads(out)
    assert code == 0
    assert record["status"] == "done"
    assert list(record["stages"]) == ALL
