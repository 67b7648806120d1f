"""An encoder-decoder from random weights through prepare, sft, ppo with a Python reward, and evaluate."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSeq2SeqLM

from rlhf.config import PipelineConfig
from rlhf.context import Context
from rlhf.stages import STAGES, enabled_stages
from rlhf.tracker import JournalTracker

WORDS = ["ant", "bee", "cat", "dog", "eel", "fox"]
REWARD = "def brevity(prompts, responses):\n    return [-float(len(response)) for response in responses]\n"
Finals = dict[str, float]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Finals]:
    """Runs every stage, each on what those before it left; their final metrics. Artifacts: ``tmp_path/<stage>``."""
    rows = [{"prompt": " ".join(words), "response": words[0]} for words in itertools.permutations(WORDS, 3)]
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

    def stages(**model: Any) -> Finals:
        config = PipelineConfig.model_validate(sections | {"model": sections["model"] | model})
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


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2, "gradient_checkpointing": True}], ids=["full", "lora"])
def test_an_encoder_decoder_goes_all_the_way(
    run: Callable[..., Finals], options: dict[str, Any], tmp_path: Path
) -> None:
    finals = run(**options)
    assert finals["sft/validation_loss"] < math.log(270) - 1
    assert finals["evaluate/sft/brief"] > finals["evaluate/base/brief"]
    assert finals["evaluate/sft/kl"] == 0.0
    assert 0.0 < finals["evaluate/ppo/kl"] < finals["evaluate/base/kl"]
    for stage in ("sft", "ppo"):
        assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / stage / "model").config.model_type == "t5"
    assert (tmp_path / "evaluate/report.html").exists()
