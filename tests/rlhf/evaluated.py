"""Evaluations of tiny random GPT-2s: what the earlier stages left, a configuration, and one run of the stage."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf.config.pipeline import PipelineConfig
from rlhf.context import Context
from rlhf.evaluate import output, stage as evaluate
from rlhf.tracking.tracker import NullTracker

PROMPTS = 24
WORDS = ["the", "gym", "is", "closed", "on", "monday", "because", "of", "a", "leak", "so", "please", "use", "noon"]
SIZE = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
seen: list[dict[str, Any]] = []


def keyword(prompts: Sequence[str], responses: Sequence[str], word: Sequence[str], **columns: Any) -> list[float]:
    """A scorer that wants a column of the rows."""
    seen.append({"prompts": prompts, "responses": responses, "word": word, **columns})
    return [float(response.count(one)) for response, one in zip(responses, word, strict=True)]


def broken(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
    return [math.nan] * len(prompts)


def longer(prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str], **columns: Any) -> list[float]:
    """A judge that prefers the longer response, and the first of two that are equally long."""
    assert len(columns["word"]) == len(prompts)
    return [1.0 if len(first) >= len(second) else -1.0 for first, second in zip(firsts, seconds, strict=True)]


def undecided(prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str], **columns: Any) -> list[float]:
    return [math.nan] * len(prompts)


def raises(prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str], **columns: Any) -> list[float]:
    raise KeyError("no")


def make_inputs(root: Path) -> dict[str, Path]:
    """Artifacts of all earlier stages; the policies are random, and PPO's is SFT's with some noise."""
    corpus = [" ".join(WORDS), " ".join(reversed(WORDS))]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(corpus, vocab_size=300, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>", pad_token="<end>")
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

    torch.manual_seed(0)
    for stage, part in (("prepare", "base"), ("sft", "model")):
        GPT2LMHeadModel(GPT2Config(**SIZE, **ids)).save_pretrained(root / stage / part)
    ppo = GPT2LMHeadModel.from_pretrained(root / "sft" / "model")
    with torch.no_grad():
        for weight in ppo.parameters():
            weight += 0.05 * torch.randn_like(weight)
    ppo.save_pretrained(root / "ppo" / "model")
    reward = GPT2ForSequenceClassification(GPT2Config(**SIZE, **ids, num_labels=1))
    reward.config.score_mean, reward.config.score_std = 0.25, 2.0
    reward.save_pretrained(root / "reward" / "model")
    GPT2ForSequenceClassification(GPT2Config(**SIZE, **ids, num_labels=1)).save_pretrained(root / "reward" / "held_out")
    for model in ("prepare/base", "sft/model", "ppo/model", "reward/model", "reward/held_out"):
        tokenizer.save_pretrained(root / model)

    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, 6 + row % 5)) for row in range(PROMPTS + 3)]
    table = {
        "prompt": [f"{text} {row}:" for row, text in enumerate(texts)],
        "reference": [None if row == 3 else f" {text}." for row, text in enumerate(texts)],
        "word": [text.split()[0] for text in texts],
        "words": [None if row == 5 else 3 + row % 4 for row, _ in enumerate(texts)],
    }
    (root / "prepare" / "prompts").mkdir(parents=True)
    pq.write_table(pa.table(table), root / "prepare" / "prompts" / "test.parquet")
    curves = {"step": [1, 2], "score_mean": [0.0, 1.0], "kl": [0.0, 2.0], "entropy": [3.0, 3.0]}
    pq.write_table(pa.table(curves), root / "ppo" / "curves.parquet")
    evaluations = {
        "update": [0, 1, 2], "score": [0.0, 1.0, 2.0], "score_stderr": [0.1] * 3, "kl": [0.0, 1.0, 4.0],
        "response_length_mean": [3.0] * 3, "eos_rate": [1.0] * 3, "reward/model": [0.0, 1.0, 2.0],
        "judge/held_out": [0.0, 0.5, -1.0], "judge/held_out_stderr": [0.2] * 3,
        "overoptimised/held_out": [0.0, 0.0, 1.0],
    }  # fmt: skip
    pq.write_table(pa.table(evaluations), root / "ppo" / "evaluations.parquet")
    pairs = {"split": ["test"] * 4 + ["train"], "chosen_score": [2.0, 1, 3, 1, 9], "rejected_score": [1.0, 1, 2, 2, 0]}
    pq.write_table(pa.table(pairs), root / "reward" / "scores.parquet")
    return {stage: root / stage for stage in ("prepare", "sft", "reward", "ppo")}


def config(**settings: Any) -> PipelineConfig:
    sections = {name: settings.pop(name) for name in ("sft", "reward", "ppo") if name in settings}
    evaluate_section = {
        "prompts": PROMPTS, "max_new_tokens": 12, "temperature": 0.7, "bootstrap": 50, "batch_size": 7,
        "scorers": {"keyword": f"{__name__}:keyword"}, **settings,
    }  # fmt: skip
    return PipelineConfig.model_validate(
        {
            "name": "tiny",
            "seed": 3,
            "data": {"demonstrations": "d.jsonl", "preferences": "p.jsonl"},
            "model": {"init": "random", "layers": 1, "width": 16, "heads": 2, "context": 64, "vocab_size": 300},
            "evaluate": evaluate_section,
            "resources": {"device": "cpu", "threads": 1},
            **sections,
        }
    )


def context(made: PipelineConfig, inputs: dict[str, Path], root: Path) -> Context:
    out = root / "out"
    out.mkdir()
    return Context("evaluate", made, inputs, out, root / "checkpoints", NullTracker())


class Ran:
    """What one run of the stage gave. Drawing takes most of its time, so only some draw."""

    def __init__(self, made: Context, draw: bool = False) -> None:
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            if not draw:
                patch.setattr(output, "_draw", lambda *args: None)
            self.finals = evaluate.run(made)
        self.out = made.out
        self.report = json.loads((made.out / "report.json").read_text())
        self.samples = pq.read_table(made.out / "samples.parquet").to_pydict()


def pairs_of(ran: Ran) -> list[tuple[str, str]]:
    return [(one["candidate"], one["baseline"]) for one in ran.report["comparisons"]]


def prepared(inputs: dict[str, Path], folder: Path, prompts: pa.Table) -> Path:
    """An artifact of prepare with other held-out prompts."""
    (folder / "prompts").mkdir(parents=True)
    pq.write_table(prompts, folder / "prompts" / "test.parquet")
    (folder / "base").symlink_to(inputs["prepare"] / "base")
    return folder
