"""Tiny random models through all stages: an encoder-decoder with a Python reward, and frozen weights in bf16."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from rlhf.config.pipeline import PipelineConfig
from rlhf.context import Context
from rlhf.errors import DataError
from rlhf.models import loading
from rlhf.stages import STAGES, enabled_stages
from rlhf.tracking.tracker import JournalTracker

WORDS = ["ant", "bee", "cat", "dog", "eel", "fox"]
REWARD = "def brevity(prompts, responses):\n    return [-float(len(response)) for response in responses]\n"
Finals = dict[str, float]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Finals]:
    """Runs every stage, each on what those before it left; their final metrics. Artifacts: ``tmp_path/<stage>``."""
    rows = [
        {"prompt": " ".join(words), "response": words[0], "chosen": words[0], "rejected": " ".join(words[1:])}
        for words in itertools.permutations(WORDS, 3)
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "rewards.py").write_text(REWARD)
    sections: dict[str, Any] = {
        "data": {"demonstrations": str(tmp_path / "d.jsonl"), "validation_fraction": 0.1},
        "model": {"init": "random", "architecture": "t5", "layers": 1, "width": 16, "heads": 2, "context": 48,
                  "vocab_size": 270},
        "sft": {"epochs": 4, "batch_size": 8, "learning_rate": 1e-2},
        "judge": False,
        "reward": False,
        "ppo": {"updates": 2, "episodes": 8, "max_new_tokens": 6, "rewards": {f"{tmp_path}/rewards.py:brevity": 1.0},
                "eval_every": 1, "eval_prompts": 4},
        "evaluate": {"prompts": 6, "max_new_tokens": 6, "bootstrap": 20,
                     "scorers": {"brief": f"{tmp_path}/rewards.py:brevity"}},
        "resources": {"device": "cpu", "threads": 1},
    }  # fmt: skip

    def stages(with_reward_model: bool = False, **model: Any) -> Finals:
        changed = sections | {"model": sections["model"] | model}
        if with_reward_model:
            changed["data"] = changed["data"] | {"preferences": changed["data"]["demonstrations"]}
            changed["reward"] = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2}
            changed["ppo"] = changed["ppo"] | {"rewards": {"model": 1.0}}
        config = PipelineConfig.model_validate(changed)
        inputs: dict[str, Path] = {}
        finals: Finals = {}
        for name in enabled_stages(config):
            out, checkpoints = tmp_path / name, tmp_path / f"{name}-checkpoints"
            out.mkdir()
            checkpoints.mkdir()
            context = Context(name, config, inputs, out, checkpoints, JournalTracker(tmp_path / f"{name}.jsonl"))
            finals |= import_module(STAGES[name].module).run(context)
            inputs = {**inputs, name: out}
        return finals

    return stages


LORA = {"lora_rank": 2, "gradient_checkpointing": True}


@pytest.mark.parametrize("options", [{}, LORA, LORA | {"dtype": "bfloat16"}], ids=["full", "lora", "bf16"])
def test_an_encoder_decoder_goes_all_the_way(
    run: Callable[..., Finals], options: dict[str, Any], tmp_path: Path
) -> None:
    finals = run(**options)
    assert finals["sft/validation_loss"] < math.log(270) - 1
    assert finals["evaluate/sft/brief"] > finals["evaluate/base/brief"]
    assert finals["evaluate/sft/kl"] == 0.0  # the reference is the same model in the same type
    assert 0.0 < finals["evaluate/ppo/kl"] < finals["evaluate/base/kl"]
    for stage in ("sft", "ppo"):
        assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / stage / "model").config.model_type == "t5"
    assert (tmp_path / "evaluate/report.json").exists()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_frozen_weights_in_bf16_go_all_the_way(
    run: Callable[..., Finals], architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    original = loading._load_weights

    def spy(*arguments: Any, **options: Any) -> Any:
        model = original(*arguments, **options)
        loaded.append(model.dtype)
        return model

    monkeypatch.setattr(loading, "_load_weights", spy)
    finals = run(with_reward_model=True, architecture=architecture, lora_rank=2, dtype="bfloat16")
    assert set(loaded) == {torch.bfloat16}
    assert finals["sft/validation_loss"] < math.log(270)
    assert finals["reward/test_accuracy"] > 0.6
    assert finals["evaluate/sft/kl"] == 0.0
    for path in tmp_path.glob("*/*model*/model.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}, path


def test_the_reward_model_of_an_encoder_decoder_starts_from_it(run: Callable[..., Finals], tmp_path: Path) -> None:
    finals = run(with_reward_model=True)
    assert finals["reward/test_accuracy"] > 0.6
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward" / "model")
    assert model.config.model_type == "t5"


def test_a_t5_has_the_context_that_was_asked_for(run: Callable[..., Finals]) -> None:
    """Its positions are relative and know no limit; prepare does."""
    with pytest.raises(DataError, match="the model's context"):
        run(context=10, vocab_size=260)
