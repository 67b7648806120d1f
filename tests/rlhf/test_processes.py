"""Trainings in two processes (gloo, on the CPU) give what one process gives; and each one's share of the batches."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

from rlhf import models, processes, sft, training
from rlhf.context import Context
from rlhf.errors import ConfigError
from rlhf.reward import trainer as reward_trainer
from rlhf.stages import STAGES
from rlhf.tracker import Entry, Progress, read_journal
from tasks import launch

CLOSE = {"rel": 1e-5, "abs": 1e-5}
# Python names: AdamW divides by the size of a gradient, so that rounding of one near 0 would show whole in a weight.
STEADY: dict[str, Any] = {"learning_rate": 1e-3, "log_every": 1, "checkpoint_every": 100, "max_steps": 12}


def in_one(context: Context) -> dict[str, float]:
    """The stage as its task calls it for one process."""
    finals: dict[str, float] = importlib.import_module(STAGES[context.stage].module).run(context)
    return finals


def in_two(context: Context, heard: list[Entry | Progress] | None = None) -> dict[str, float]:
    """The stage in two processes."""
    resources = context.config.resources.model_copy(update={"processes": 2, "threads": 2})
    config = context.config.model_copy(update={"resources": resources})
    journal = context.checkpoints.parent / "metrics.jsonl"
    return launch.run(replace(context, config=config), journal, [].append if heard is None else heard.append)


def weights(context: Context) -> dict[str, torch.Tensor]:
    return load_file(context.out / "model/model.safetensors")


def assert_same(one: Context, two: Context, finals: list[dict[str, float]]) -> None:
    """Final figures, every point of every curve, and the weights."""
    assert finals[1] == pytest.approx(finals[0], **CLOSE)
    curves = [list(read_journal(c.checkpoints.parent / "metrics.jsonl")) for c in (one, two)]
    assert [(e.step, e.values.keys()) for e in curves[0]] == [(e.step, e.values.keys()) for e in curves[1]]
    for a, b in zip(*curves, strict=True):
        assert b.values == pytest.approx(a.values, **CLOSE)
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-5


@pytest.mark.slow
def test_sft(toy: Any) -> None:
    section = STEADY | {"batch_size": 32}
    contexts = [toy.context("sft", run=name, sft=section) for name in ("one", "two")]
    heard: list[Entry | Progress] = []
    finals = [in_one(contexts[0]), in_two(contexts[1], heard)]
    assert_same(*contexts, finals)
    assert [event for event in heard if isinstance(event, Entry)] == list(read_journal(toy.journal("two")))
    assert [event.done for event in heard if isinstance(event, Progress)] == list(range(1, 13))
