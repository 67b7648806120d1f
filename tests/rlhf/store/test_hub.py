"""Hub models where the hub cannot be reached: what is said, and that nothing is tried again and again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from rlhf.errors import ModelError
from rlhf.models import loading
from rlhf.prepare.random_weights import random_model
from rlhf.store import hub

COMMIT = "0123456789abcdef" * 2 + "01234567"
UNREACHABLE = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a hub that does not answer."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", UNREACHABLE)
    hub.find.cache_clear()
    yield tmp_path / "hub/models--some--model"
    hub.find.cache_clear()


def cached(folder: Path) -> Path:
    """Note a commit as the newest one; the folder of its files."""
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    return folder / "snapshots" / COMMIT


def test_the_cache_knows_a_commit_that_the_hub_does_not_give(folder: Path) -> None:
    cached(folder)
    assert hub.find("some/model", None) == hub.find("some/model", COMMIT) == (COMMIT, False)
    assert hub.resolve_commit("some/model", None) == COMMIT
    assert hub.resolve_commit("other/model", COMMIT) == COMMIT  # it says all itself
    with pytest.raises(ModelError, match="revision v2"):
        hub.find("some/model", "v2")


def test_a_model_of_the_cache_loads_without_the_hub(folder: Path, toy: object, tmp_path: Path) -> None:
    from rlhf.config.model import Model

    tokenizer = loading.load_tokenizer(toy.shared / "prepare/base")  # type: ignore[attr-defined]
    size = {"layers": 1, "width": 16, "heads": 2, "context": 48, "vocab_size": 270}
    model = random_model(Model(init="random", **size), tokenizer)
    loading.save(model, tokenizer, cached(folder))
    loaded = loading.load_policy("some/model")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loading.load_tokenizer("some/model").get_vocab() == tokenizer.get_vocab()
    (folder / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="the hub did not answer; looked in its cache folder"):
        loading.load_policy("some/model")


@pytest.mark.parametrize("command", ["plan", "validate", "run"])
@pytest.mark.parametrize("option", ["model.path", "reward.path"])
def test_an_unreachable_model_ends_a_command_with_one_message(command: str, option: str, tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PREFECT_"))}
    environment = kept | {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": UNREACHABLE}
    overrides = [f"{option}=some/model", *(["model.init=pretrained"] if option == "model.path" else [])]
    arguments = [word for text in overrides for word in ("--set", text)]
    done = subprocess.run(
        [sys.executable, "-m", "flows.commands.cli", command, "demo", *arguments],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    [message] = done.stderr.splitlines()  # and no traceback, no word of another try
    places = [tmp_path / "some/model", tmp_path / "hf/hub/models--some--model", f"{UNREACHABLE}/some/model"]
    for part in ("'some/model'", *map(str, places), f"Set {option} to a local directory"):
        assert part in message
