"""``rlhf champion``: real runs, tiny models, the gate, the way back, and MLflow beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from flows.commands.cli import main
from rlhf.champions import contest, ledger as champion
from rlhf.champions.gate import Figures, Pair
from rlhf.champions.ledger import Considered, Contender
from rlhf.runs.records import RunRecord, read_runs
from rlhf.store.artifacts import Store
from tasks.mlflow.server import default_uri
from tests.rlhf.projects import good

Rlhf = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.slow
TINY = (
    *("--set", "sft.max_steps=2", "--set", "reward.max_steps=2", "--set", "ppo.updates=1", "--set", "ppo.epochs=1"),
    *("--set", "evaluate.prompts=8", "--set", "evaluate.bootstrap=20", "--set", "promotion.min_prompts=2"),
    *("--set", "resources.threads=1", "--set", "evaluate.temperature=1"),
    *("--set", "ppo.eval_every=0"),
)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory, prefect_api: str, mlflow_tables: Path) -> Path:
    """A home folder with two finished runs of a tiny pipeline; their policies differ."""
    folder = tmp_path_factory.mktemp("project")
    source, home = str(good(folder)), folder / "home"
    home.mkdir()
    shutil.copy(mlflow_tables, home / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_HOME", str(home))
        patch.setenv("RLHF_STORE", "")
        for rate in ("0.01", "0.02"):
            assert main(["run", source, *TINY, "--home", str(home), "--set", f"ppo.learning_rate={rate}"]) == 0
    return home


@pytest.fixture
def home(two_runs: Path, tmp_path: Path) -> Path:
    """A copy of it, which the test may change; MLflow's files stay where they are."""
    shutil.copytree(two_runs, tmp_path / "home", ignore=shutil.ignore_patterns("mlartifacts", "prefect"))
    return tmp_path / "home"


@pytest.fixture
def runs(home: Path) -> list[RunRecord]:
    return read_runs(home)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figures]:
    """What contests find from now on, one after the other, in place of models that have learnt nothing."""
    queue: list[Figures] = []
    monkeypatch.setattr(contest, "hold", lambda *_: queue.pop(0))
    return queue


@pytest.fixture
def champions(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Rlhf:
    """The command in this process."""
    monkeypatch.setenv("RLHF_USER", "ann")

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["champion", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def found(better: float = 1.0, **more: Any) -> Figures:
    import numpy as np

    noise = np.tile([0.9, 1.1], 20)
    return Figures("the champion", Pair(noise * better, noise * 0), None, 1.0, 0.0)._replace(**more)


def test_from_the_first_champion_to_the_way_back(
    champions: Rlhf, home: Path, runs: list[RunRecord], figures: list[Figures]
) -> None:
    first, second = (run.id for run in runs)
    assert champions() == (
        0,
        "No champion yet: `rlhf champion promote` lets the gate decide about the last finished run\n",
        "",
    )
    figures += [found(), found(), found(-1.0, kl=99.0)]
    code, out, _ = champions("promote", first)
    assert code == 0
    assert f"tiny: run {first} is the champion now; it was none" in out
    assert "Note: there are no references, so that text metrics are left out" in out

    code, out, _ = champions("promote", "--json")  # the last finished run
    said = json.loads(out)
    assert (code, said["run"], said["champion"], said["promoted"]) == (0, second, first, True)
    assert [condition["name"] for condition in said["conditions"]] == ["prompts", "judge", "kl", "overoptimised"]
    assert said["conditions"][1]["numbers"]["difference"] == pytest.approx(1.0)

    code, out, _ = champions("promote", first)
    assert code == 1
    assert f"tiny: run {first} is refused, and run {second} stays the champion" in out
    assert out.count("FAILED") == 2
    assert "99 nats per response, over the budget of 50" in " ".join(out.split())

    code, out, _ = champions("tiny")
    assert code == 0
    for line in (
        f"champion   {second}, promoted by ann on ",
        "held_out: 1 of the candidate, 0 of the champion",
        f"before     {first}; rlhf champion rollback tiny goes back to {first}",
        f"candidate  {first}, refused on ",
    ):
        assert line in out
    state = json.loads(champions("--json")[1])["tiny"]
    assert state["champion"]["champion"]["run_id"] == second
    assert state["before"] == [first]
    assert state["candidate"]["promoted"] is False

    assert champions("rollback", "tiny", "--why", "people complain") == (
        0,
        f"tiny: the champion is run {first} again; it was {second}\n",
        "",
    )
    last = champion.history(home, "tiny").last
    assert last is not None
    assert (last.event, last.who, last.why, last.champion.run_id) == ("rolled back", "ann", ("people complain",), first)
    code, _, error = champions("rollback", "tiny")
    assert code == 2
    assert f"no champion before run {first}" in error


def test_a_force_goes_past_the_gate_and_is_recorded(
    champions: Rlhf, home: Path, runs: list[RunRecord], figures: list[Figures]
) -> None:
    first, second = (run.id for run in runs)
    code, _, error = champions("promote", first, "--force")
    assert code == 2
    assert "it needs --why TEXT" in error
    assert champion.champion(home, "tiny") is None
    assert champions("promote", "tiny", "--force", "--why", "the judge is broken")[0] == 0
    last = champion.history(home, "tiny").last
    assert last is not None
    assert (last.event, last.champion.run_id, last.who) == ("forced", second, "ann")
    assert last.why == ("the judge is broken",)
    code, _, error = champions("promote", second, "--force", "--why", "again")
    assert code == 2
    assert "is the champion of 'tiny' already" in error


def test_the_real_contest(champions: Rlhf, home: Path, runs: list[RunRecord]) -> None:
    """Models that have learnt nothing: what counts here is that they answer and that all conditions are looked at."""
    first, second = (run.id for run in runs)
    code, out, error = champions("promote", first, "--json")
    said = json.loads(out)
    assert (code == 0) is said["promoted"], error
    assert [condition["name"] for condition in said["conditions"]][:4] == ["prompts", "judge", "kl", "rouge"]
    assert said["conditions"][0]["numbers"]["prompts"] == 8
    if not said["promoted"]:
        assert champions("promote", first, "--force", "--why", "to have one")[0] == 0
    said = json.loads(champions("promote", second, "--json")[1])
    assert said["champion"] == first
    assert f"of the champion, run {first}; the difference" in said["conditions"][1]["sentence"]
    code, out, _ = champions("promote", first)
    holder = champion.champion(home, "tiny")
    assert holder is not None
    if holder.run_id == first:
        assert (code, out) == (
            0,
            f"tiny: the policy of run {first} is that of the champion, run {first}: nothing to decide\n",
        )


def test_mlflow_follows(champions: Rlhf, home: Path, runs: list[RunRecord], figures: list[Figures]) -> None:
    """The runs have registered their models; the alias moves with the champion, also later."""
    first, second = (run.id for run in runs)
    client = MlflowClient(default_uri(home))
    versions = {v.tags["rlhf.run_id"]: int(v.version) for v in client.search_model_versions("name = 'tiny'")}
    assert versions == {first: 1, second: 2}

    def alias(name: str = "tiny") -> int | None:
        version = client.get_registered_model(name).aliases.get("champion")
        return None if version is None else int(version)

    assert alias() is None
    figures += [found(), found()]
    assert champions("promote", first)[0] == 0
    assert (alias(), alias("tiny-reward")) == (1, 1)
    assert champions("promote", second)[0] == 0
    assert alias() == 2
    tags = client.get_model_version("tiny", "2").tags
    assert (tags["champion.who"], tags["champion.previous"], tags["gate"]) == ("ann", first, "promoted")
    # Somebody changes it where MLflow cannot be asked; the next command that can tells it.
    champion.roll_back(home, "tiny", who="bob", why=())
    assert alias() == 2
    assert champions()[0] == 0
    assert alias() == 1


def test_gc_keeps_what_one_can_go_back_to(
    champions: Rlhf, home: Path, runs: list[RunRecord], figures: list[Figures], capsys: pytest.CaptureFixture[str]
) -> None:
    figures += [found(), found()]
    for run in runs:
        assert champions("promote", run.id)[0] == 0
    shutil.rmtree(home / "runs" / runs[0].id)
    assert main(["cache", "gc", "--keep", "1"]) == 0
    Store(home).open("ppo", runs[0].stages["ppo"]["key"])
    assert champions("rollback", "tiny")[0] == 0
    shutil.rmtree(Store(home).path("ppo", runs[1].stages["ppo"]["key"]))
    code, _, error = champions("promote", runs[1].id, "--force", "--why", "back")
    assert code == 1
    assert f"the policy of run {runs[1].id}, ppo/{runs[1].stages['ppo']['key']}, cannot be opened: missing" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["promote", "tny"], "there is no finished run or pipeline 'tny' with an evaluation"),
        (["promote", "stopped"], "run 'stopped' is interrupted, with the stages prepare"),
        (["promote", "a", "b"], "expected"),
        (["rollback"], "expected"),
        (["rollback", "tiny"], "'tiny' has no champion"),
        (["rollback", "tiny", "--force"], "--force is for promote"),
        (["tinny"], "pipeline 'tinny' has no champion and no candidate yet; did you mean 'tiny'?"),
        (["tiny", "--force"], "--force and --why are for promote and rollback"),
    ],
)
def test_what_makes_no_sense_ends_with_2(champions: Rlhf, home: Path, arguments: list[str], message: str) -> None:
    RunRecord("stopped", "tiny", "interrupted", 1.0, stages={"prepare": {"key": "x"}}).write(home)
    champion.consider(home, "tiny", Considered(Contender("r", {}), False, ()))
    code, out, error = champions(*arguments)
    assert (code, out) == (2, "")
    assert message in error
