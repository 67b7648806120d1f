"""A tiny ppo stage whose reward function does what a test wants of a process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rlhf import models
from rlhf.config import PipelineConfig
from rlhf.context import Context
from rlhf.data.tokens import train_tokenizer
from rlhf.random_weights import random_model
from rlhf.tracker import NullTracker

WORDS = ["ant", "bee", "cat", "dog", "eel", "fox"]
REWARDS = Path(__file__).with_name("process_rewards.py")


@pytest.fixture
def make_ppo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Context]:
    """A function that makes a context of the ppo stage for two processes, with a function of ``process_rewards``.

    Each process writes its id into the folder ``tmp_path/pids``.
    """
    torch.set_num_threads(1)
    (tmp_path / "pids").mkdir()
    monkeypatch.setenv("TEST_PIDS", str(tmp_path / "pids"))
    size = {"layers": 1, "width": 8, "heads": 2, "context": 32, "vocab_size": 260}

    def make(function: str, prompts: int = 6, **resources: Any) -> Context:
        config = PipelineConfig.model_validate(
            {
                "data": {"demonstrations": "x.jsonl"},
                "model": {"init": "random", **size},
                "resources": {"device": "cpu", "threads": 2, "processes": 2, **resources},
                "judge": "off",
                "reward": "off",
                "ppo": {"updates": 2, "episodes": 4, "max_new_tokens": 4, "rewards": {f"{REWARDS}:{function}": 1.0}},
                "evaluate": {"max_new_tokens": 4},
            }
        )
        tokenizer = train_tokenizer(WORDS, 260, 32)
        torch.manual_seed(0)
        models.save(random_model(config.model, tokenizer), tokenizer, tmp_path / "sft/model")
        path = tmp_path / "prepare/prompts/train.parquet"
        path.parent.mkdir(parents=True)
        schema = pa.schema([("prompt", pa.string())])
        pq.write_table(pa.Table.from_pylist([{"prompt": f"{word}\n"} for word in WORDS[:prompts]], schema), path)
        for name in ("out", "checkpoints"):
            (tmp_path / name).mkdir()
        inputs = {"prepare": tmp_path / "prepare", "sft": tmp_path / "sft"}
        return Context("ppo", config, inputs, tmp_path / "out", tmp_path / "checkpoints", NullTracker())

    return make
