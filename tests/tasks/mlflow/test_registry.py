"""MLflow's model registry: a version for each model, aliases that follow the truth, and the way back to files."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from mlflow import MlflowClient
from transformers import PreTrainedTokenizerFast

from flows.team.server import free_port
from rlhf.champions import ledger as champion
from rlhf.champions.ledger import Considered, Contender
from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import ArtifactError, ConfigError
from rlhf.models import loading
from rlhf.prepare.random_weights import random_model
from rlhf.prepare.tokens import train_tokenizer
from rlhf.store.artifacts import Store, make_manifest
from tasks import mlflow_run
from tasks.mlflow import registry
from tasks.mlflow.journal import RunJournal
from tasks.mlflow.server import default_uri
from tasks.mlflow.sync import ship
from tasks.run import Run

CONFIG = {
    "name": "tiny",
    "data": {"demonstrations": "x.jsonl", "preferences": "y.jsonl"},
    "model": {"init": "random", "layers": 1, "width": 8, "heads": 2, "context": 32, "vocab_size": 260},
    "judge": "off",
    "ppo": {"max_new_tokens": 8},
    "evaluate": {"max_new_tokens": 8},
}
METRICS = {
    "ppo": {"ppo/overoptimised": 0.0},
    "reward": {"reward/test_accuracy": 0.875, "reward/test_accuracy_low": 0.8, "reward/test_accuracy_high": 0.9},
    "evaluate": {
        "evaluate/sft/length_tokens": 9.0,
        "evaluate/ppo/length_tokens": 8.0,
        "evaluate/ppo/kl": 1.5,
        "evaluate/win_rate/held_out": 0.75,
        "evaluate/win_rate/held_out_low": 0.7,
        "evaluate/win_rate/held_out_high": 0.8,
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["ant bee cat"], 260, 32)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def finished(store: Store, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Makes the run of an id as if it had ended, with models drawn from a seed; its journal is not shipped."""

    def make(run_id: str, seed: int, stages: tuple[str, ...] = ("prepare", "sft", "reward", "ppo", "evaluate")) -> Any:
        config = PipelineConfig.model_validate(CONFIG)
        with RunJournal.open(store.home / "runs" / run_id) as journal:
            run = Run(run_id, config, store, None, journal)  # type: ignore[arg-type]
            mlflow_run.begin(run, "[link](http://prefect)")
            for stage in stages:
                key = f"{stage}{seed}"
                if not store.path(stage, key).exists():
                    out = store.work_directory(stage, key) / "out"
                    out.mkdir(parents=True)
                    torch.manual_seed(seed)
                    if stage in ("sft", "reward", "ppo"):
                        loading.save(random_model(config.model, tokenizer), tokenizer, out / "model")
                    about = {"stage": stage, "key": key, "ingredients": {}, "metrics": METRICS.get(stage, {})}
                    store.publish(out, make_manifest(out, **about))
                manifest = store.open(stage, key)
                run.manifests[stage] = manifest
                mlflow_run.record(run, stage, manifest)
            mlflow_run.finish(run, "[link](http://prefect)")
        return Contender(run_id, {stage: manifest.key for stage, manifest in run.manifests.items()})

    return make


@pytest.fixture
def sqlite(store: Store, mlflow_tables: Path) -> str:
    store.home.mkdir(parents=True, exist_ok=True)
    shutil.copy(mlflow_tables, store.home / "mlflow.db")
    return default_uri(store.home)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, mlflow_tables: Path) -> Iterator[str]:
    """An MLflow server that keeps models itself."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    shutil.copy(mlflow_tables, folder / "mlflow.db")
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")),
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def aliases(uri: str, name: str) -> dict[str, int]:
    found = MlflowClient(uri).get_registered_model(name).aliases
    return {alias: int(version) for alias, version in found.items()}


def test_a_finished_run_registers_its_models_once(finished: Any, store: Store, sqlite: str) -> None:
    first = finished("20260101-a", seed=1)
    state = ship(store.home / "runs" / first.run_id, sqlite)
    assert (state.complete, state.skipped) == (True, 0)
    (store.home / "runs" / first.run_id / "shipped.json").unlink()
    assert ship(store.home / "runs" / first.run_id, sqlite).complete
    client = MlflowClient(sqlite)
    [policy] = client.search_model_versions("name = 'tiny'")
    [reward] = client.search_model_versions("name = 'tiny-reward'")
    assert aliases(sqlite, "tiny") == {"candidate": 1}
    assert policy.tags["rlhf.run_id"] == "20260101-a"
    assert (policy.tags["rlhf.stage"], policy.tags["rlhf.key"]) == ("ppo", "ppo1")
    assert policy.tags["rlhf.digest"] == store.open("ppo", "ppo1").parts["model"]
    assert policy.tags["evaluate/win_rate/held_out"] == "0.750 [0.70, 0.80]"
    assert policy.tags["ppo/overoptimised"] == "0.000"
    assert reward.tags["reward/test_accuracy"] == "0.875 [0.80, 0.90]"
    assert "Policy after ppo of run `20260101-a`" in policy.description
    assert 'rlhf generate models:/tiny@champion --prompt "..."' in policy.description
    assert "rlhf champion rollback tiny" in client.get_registered_model("tiny").description

    # A run of the same models finds them; another one's are new; a journal that comes late takes no alias back.
    finished("20260102-b", seed=1)
    finished("20260103-c", seed=2)
    for run in ("20260103-c", "20260102-b"):
        assert ship(store.home / "runs" / run, sqlite).complete
    assert [int(version.version) for version in client.search_model_versions("name = 'tiny'")] == [2, 1]
    assert aliases(sqlite, "tiny") == aliases(sqlite, "tiny-reward") == {"candidate": 2}
    # The old models once more, by a later run: they are the candidate again.
    finished("20260104-d", seed=1)
    assert ship(store.home / "runs" / "20260104-d", sqlite).complete
    assert aliases(sqlite, "tiny") == {"candidate": 1}


def test_a_run_that_did_not_see_all_stages_registers_nothing(finished: Any, store: Store, sqlite: str) -> None:
    finished("20260101-a", seed=1, stages=("prepare", "sft", "reward", "ppo"))
    assert ship(store.home / "runs" / "20260101-a", sqlite).complete
    assert MlflowClient(sqlite).search_registered_models() == []


def test_the_note_of_a_run_says_what_was_asked_and_what_it_came_to(finished: Any, store: Store, sqlite: str) -> None:
    run = finished("20260101-a", seed=1)
    champion.consider(store.home, "tiny", Considered(run, False, ("the KL is over the budget",)))
    assert registry.tell(store.home, "tiny", sqlite)
    client = MlflowClient(sqlite)
    [experiment] = [one for one in client.search_experiments() if one.name == "rlhf"]
    [parent] = client.search_runs([experiment.experiment_id], "tags.`rlhf.stage` = 'pipeline'")
    assert parent.data.tags["mlflow.note.content"].split("\n\n") == [
        "PPO is better than SFT: win rate 0.750 [0.70, 0.80] by held_out, at a KL of 1.5 nats per response.",
        "Asked: seed 0; 1 epochs of SFT of a gpt2 from random weights; 1 epochs of pairwise reward training of the SFT "
        "policy; 100 updates of 64 episodes of PPO with the reward model x 1.0, KL coefficient 0.05.",
        "[link](http://prefect)",
        "The gate: refused. the KL is over the budget",
    ]
    assert parent.data.tags["rlhf.gate"] == "refused"
    [version] = client.search_model_versions("name = 'tiny'")
    assert (version.tags["gate"], version.tags["gate.why"]) == ("refused", "the KL is over the budget")


def test_champions_are_told_late_and_once(
    finished: Any, store: Store, sqlite: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = finished("20260101-a", seed=1), finished("20260102-b", seed=2)
    champion.promote(store.home, "tiny", first, over=None, who="ann", why=("better than sft",))
    away = "http://127.0.0.1:9"
    assert not registry.tell(store.home, "tiny", away)
    assert "does not know the champion of tiny yet" in caplog.text
    assert champion.history(store.home, "tiny").told == 0
    champion.promote(store.home, "tiny", second, over=first, who="bob", why=("better still",))
    assert registry.tell(store.home, "tiny", sqlite)  # it ships the runs, too, which nobody has until now
    assert aliases(sqlite, "tiny") == aliases(sqlite, "tiny-reward") == {"candidate": 2, "champion": 2}
    client = MlflowClient(sqlite)
    tags = client.get_model_version("tiny", "1").tags
    assert (tags["champion.who"], tags["champion.why"], tags["champion.previous"]) == ("ann", "better than sft", "none")
    tags = client.get_model_version("tiny", "2").tags
    assert (tags["champion.event"], tags["champion.who"]) == ("promoted", "bob")
    assert tags["champion.previous"] == "20260101-a"
    assert registry.is_told(store.home, "tiny")
    assert registry.tell(store.home, "tiny", away)  # nobody is asked

    champion.roll_back(store.home, "tiny", who="cy", why=("complaints",))
    assert not registry.is_told(store.home, "tiny")
    assert registry.tell(store.home, "tiny", sqlite)
    assert aliases(sqlite, "tiny") == aliases(sqlite, "tiny-reward") == {"candidate": 2, "champion": 1}
    tags = client.get_model_version("tiny", "1").tags
    assert (tags["champion.event"], tags["champion.who"], tags["champion.why"]) == ("rolled back", "cy", "complaints")


def test_a_champion_without_reward_model_leaves_none_behind(finished: Any, store: Store, sqlite: str) -> None:
    first, second = finished("20260101-a", seed=1), finished("20260102-b", seed=2)
    champion.promote(store.home, "tiny", first, over=None, who="ann", why=())
    bare = Contender(second.run_id, {stage: key for stage, key in second.keys.items() if stage != "reward"})
    champion.promote(store.home, "tiny", bare, over=first, who="ann", why=())
    assert registry.tell(store.home, "tiny", sqlite)
    assert aliases(sqlite, "tiny")["champion"] == 2
    assert "champion" not in aliases(sqlite, "tiny-reward")


def test_a_version_that_is_not_there_is_no_reason_to_wait_for_ever(
    finished: Any, store: Store, sqlite: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    gone = Contender("20250101-z", {"ppo": "nowhere"})
    champion.promote(store.home, "tiny", gone, over=None, who="ann", why=())
    assert registry.tell(store.home, "tiny", sqlite)
    assert "MLflow has no version of tiny" in caplog.text
    assert champion.history(store.home, "tiny").told == 1


@pytest.mark.parametrize("kind", ["sqlite", "server"])
def test_a_registered_model_leads_to_its_directory(
    kind: str, finished: Any, store: Store, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    uri = request.getfixturevalue(kind)
    run = finished("20260101-a", seed=3)
    champion.promote(store.home, "tiny", run, over=None, who="ann", why=())
    assert registry.tell(store.home, "tiny", uri)
    here = store.path("ppo", "ppo3") / "model"
    number = aliases(uri, "tiny")["champion"]
    for name in ("models:/tiny@champion", "models:/tiny@candidate", f"models:/tiny/{number}"):
        assert registry.directory(store, name, uri) == here
    reward = registry.directory(store, "models:/tiny-reward@champion", uri)
    assert reward == store.path("reward", "reward3") / "model"

    elsewhere = Store(tmp_path / "elsewhere")
    fetched = registry.directory(elsewhere, "models:/tiny@champion", uri)
    assert fetched.parent == elsewhere.downloads
    assert {file.name: file.read_bytes() for file in fetched.iterdir()} == {
        file.name: file.read_bytes() for file in here.iterdir()
    }
    before = [file.stat().st_ino for file in fetched.iterdir()]
    os.utime(fetched, (1, 1))
    assert registry.directory(elsewhere, "models:/tiny@champion", uri) == fetched
    assert [file.stat().st_ino for file in fetched.iterdir()] == before  # not once more
    assert fetched.stat().st_mtime > 1  # it is in use, as far as cleaning goes


def test_a_damaged_download_is_refused(finished: Any, store: Store, sqlite: str) -> None:
    finished("20260101-a", seed=1)
    ship(store.home / "runs" / "20260101-a", sqlite)
    for weights in (store.home / "mlartifacts").rglob("model.safetensors"):
        weights.write_bytes(b"x" + weights.read_bytes()[1:])
    shutil.rmtree(store.path("ppo", "ppo1"))
    with pytest.raises(ArtifactError, match="is not what was registered"):
        registry.directory(store, "models:/tiny@candidate", sqlite)
    assert list(store.downloads.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/tiny", "write models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/tniy@champion", "MLflow has no registered model 'tniy'; it has: tiny, tiny-reward"),
        ("models:/tiny@champion", "has no alias 'champion'; it has: @candidate; `rlhf champion promote` makes one"),
        ("models:/tiny/7", "'tiny' has no version 7"),
    ],
)
def test_what_is_not_there_is_said(finished: Any, store: Store, sqlite: str, uri: str, message: str) -> None:
    finished("20260101-a", seed=1)
    ship(store.home / "runs" / "20260101-a", sqlite)
    with pytest.raises(ConfigError) as raised:
        registry.directory(store, uri, sqlite)
    assert message in str(raised.value)


def test_an_mlflow_that_is_not_there_is_said(store: Store) -> None:
    with pytest.raises(ConfigError, match="there is no MLflow store"):
        registry.directory(store, "models:/tiny@champion", default_uri(store.home))
    with pytest.raises(ConfigError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be asked"):
        registry.directory(store, "models:/tiny@champion", "http://me:secret@127.0.0.1:9")
