"""What trainings share: order of rows, arguments, the journal, resuming."""

from __future__ import annotations

import gc
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from rlhf.config.resources import Resources
from rlhf.errors import ConfigError, TrainingError
from rlhf.store import checkpoints
from rlhf.tracking.tracker import JournalTracker
from rlhf.training import computing, supervised
from rlhf.training.callback import MARK, PipelineCallback

LENGTHS = random.Random(0).choices(range(5, 100), k=333)


def order(epoch: int = 0, seed: int = 0, batch_size: int = 4) -> list[int]:
    sampler = supervised.LengthGroupedSampler(LENGTHS, batch_size, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("batch_size", [1, 4, 111, 332, 333, 1000])
def test_an_epoch_has_every_row_once(batch_size: int) -> None:
    assert sorted(order(batch_size=batch_size)) == list(range(len(LENGTHS)))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    torch.manual_seed(1)
    first = order()
    torch.manual_seed(2)
    assert order() == first
    assert len({tuple(order(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9


def test_rows_of_a_batch_are_of_similar_length() -> None:
    def padding(rows: list[int]) -> int:
        batches = [[LENGTHS[row] for row in rows[i : i + 4]] for i in range(0, len(rows), 4)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(order()) < padding(list(range(len(LENGTHS)))) / 10


def test_batches_are_not_in_the_order_of_their_lengths() -> None:
    rows = order()
    longest = [max(LENGTHS[row] for row in rows[i : i + 4]) for i in range(0, 332, 4)]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3


def test_batches_by_length() -> None:
    batches = list(supervised.batches_by_length([[0] * n for n in (1, 3, 2, 5, 4)], 2))
    assert batches == [[3, 4], [1, 2], [0]]


def test_padded() -> None:
    assert supervised.padded([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]


# -------------------------------------------------------------------------------------------------------- resources
def test_seed_everything() -> None:
    def draw() -> list[float]:
        computing.seed_everything(5)
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    assert draw() == draw()


def test_set_up_cpu() -> None:
    before = torch.get_num_threads()
    computing.set_up_cpu(Resources(threads=2))
    assert torch.get_num_threads() == 2
    computing.set_up_cpu(Resources(threads=1))
    computing.set_up_cpu(Resources(threads=0))
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_libraries_are_not_looked_through_for_garbage() -> None:
    """Nor is a model that is made later kept for ever."""
    gc.unfreeze()
    computing._pass_over_libraries.cache_clear()
    computing.set_up_cpu(Resources(threads=1))
    frozen = gc.get_freeze_count()
    assert frozen > 100_000
    computing.set_up_cpu(Resources(threads=1))
    assert gc.get_freeze_count() <= frozen


@pytest.mark.parametrize(
    ("device", "there", "expected"),
    [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_device_of(monkeypatch: pytest.MonkeyPatch, device: Any, there: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert computing.device_of(Resources(device=device)) == torch.device(expected)
    assert computing.mixed_precision(Resources(device=device)) == ("bf16" if expected == "cuda" else "no")
    assert computing.mixed_precision(Resources(device=device, precision="bf16")) == "bf16"
    assert computing.mixed_precision(Resources(device=device, precision="fp32")) == "no"


def test_fp16_needs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"resources\.precision is `fp16`, which needs a CUDA device"):
        computing.mixed_precision(Resources(device="cpu", precision="fp16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert computing.mixed_precision(Resources(device="cuda", precision="fp16")) == "fp16"


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"resources.device is `cuda`.*`auto` or `cpu`"):
        computing.device_of(Resources(device="cuda"))


# -------------------------------------------------------------------------------------------------------- arguments
def arguments(toy: Any, **section: Any) -> TrainingArguments:
    context = toy.context("sft", sft=section)
    return supervised.training_arguments(TrainingArguments, context.config.sft, context)


def test_the_configuration_reaches_the_trainer(toy: Any) -> None:
    args = arguments(
        toy,
        batch_size=12,
        micro_batch_size=3,
        epochs=1.5,
        learning_rate=0.25,
        weight_decay=0.125,
        beta2=0.5,
        max_grad_norm=2.0,
        schedule="cosine",
        warmup_fraction=0.25,
        log_every=3,
    )
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (3, 4)
    assert (args.num_train_epochs, args.max_steps) == (1.5, -1)
    assert (args.learning_rate, args.weight_decay, args.adam_beta2, args.max_grad_norm) == (0.25, 0.125, 0.5, 2.0)
    assert (args.lr_scheduler_type, args.get_warmup_steps(100)) == ("cosine", 25)
    assert (args.logging_steps, args.seed, args.data_seed) == (3, 3, 3)
    assert arguments(toy, max_steps=7).max_steps == 7


def test_warm_up_over_all_steps(toy: Any) -> None:
    assert arguments(toy, warmup_fraction=1.0).get_warmup_steps(100) == 100
    assert arguments(toy, warmup_fraction=0.0).get_warmup_steps(100) == 0


@pytest.mark.parametrize(("every", "log_every", "expected"), [(200, 10, 200), (3, 2, 4), (1, 10, 10), (5, 1, 5)])
def test_checkpoints_fall_on_logged_steps(toy: Any, every: int, log_every: int, expected: int) -> None:
    assert arguments(toy, checkpoint_every=every, log_every=log_every).save_steps == expected


def test_nothing_goes_elsewhere(toy: Any) -> None:
    args = arguments(toy)
    assert args.report_to == []
    assert args.disable_tqdm
    assert not args.push_to_hub
    assert Path(args.output_dir).name == "checkpoints"
    assert (args.bf16, args.activation_checkpointing, args.dataloader_pin_memory) == (False, False, False)


# --------------------------------------------------------------------------------------------- callback, resuming
def call(callback: PipelineCallback, event: str, step: int, fp16: bool = False, **more: Any) -> Any:
    args = SimpleNamespace(output_dir=more.pop("output_dir", "."), fp16=fp16)
    state = SimpleNamespace(global_step=step, max_steps=4, epoch=step / 2)
    control = SimpleNamespace(should_log=False)
    return getattr(callback, event)(args, state, control, **more)


def test_logs_go_to_the_journal_under_the_stages_name(toy: Any) -> None:
    callback = PipelineCallback(toy.context("reward"))
    call(callback, "on_log", 2, logs={"loss": 1.5, "grad_norm": 2, "mean_reward": 0.5, "epoch": 1.0, "num_tokens": 9})
    call(callback, "on_log", 4, logs={"train_runtime": 3.0, "train_loss": 1.0})
    assert toy.curves() == [(2, {"reward/loss": 1.5, "reward/grad_norm": 2.0, "reward/score_mean": 0.5})]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_not_finite_is_an_error_and_not_logged(toy: Any, name: str, value: float) -> None:
    callback = PipelineCallback(toy.context("reward"))
    with pytest.raises(TrainingError, match=f"reward: the {name} is {value} at step 6.*reward.learning_rate"):
        call(callback, "on_log", 6, logs={"loss": 1.0} | {name: value})
    assert not toy.journal().exists()


def test_a_gradient_beyond_fp16_is_an_overflow_unless_no_scale_saves_it(toy: Any) -> None:
    callback = PipelineCallback(toy.context("reward"))
    with pytest.raises(TrainingError, match="the loss is nan"):
        call(callback, "on_log", 1, fp16=True, logs={"loss": math.nan, "grad_norm": 1.0})
    for step in range(2, 18):
        call(callback, "on_log", step, fp16=True, logs={"loss": 1.0, "grad_norm": math.inf})
    assert toy.curves() == [(step, {"reward/loss": 1.0}) for step in range(2, 18)]
    with pytest.raises(TrainingError, match="the grad_norm is inf at step 18"):
        call(callback, "on_log", 18, fp16=True, logs={"loss": 1.0, "grad_norm": math.inf})


def test_progress_has_the_loss_once_there_is_one(toy: Any) -> None:
    seen = []
    tracker = SimpleNamespace(
        progress=lambda done, total, **live: seen.append((done, total, live)), log=lambda *_: None
    )
    callback = PipelineCallback(toy.context("sft", tracker=tracker))
    call(callback, "on_step_end", 1)
    call(callback, "on_log", 1, logs={"loss": 1.5})
    call(callback, "on_step_end", 2)
    assert seen == [(1, 4, {}), (2, 4, {"loss": 1.5})]


def test_evaluation_is_at_the_end_of_each_epoch_but_the_last(toy: Any) -> None:
    model = torch.nn.Linear(1, 1)
    callback = PipelineCallback(toy.context("sft"), lambda: model.eval() and {"validation_loss": 1.0})
    controls = [call(callback, "on_step_end", step, model=model) for step in (1, 2, 3, 4)]
    assert toy.curves() == [(2, {"sft/validation_loss": 1.0})]
    assert [control.should_log for control in controls] == [False, False, False, True]  # the last steps are logged
    assert model.training


def test_resume_goes_back_to_the_last_good_checkpoint_and_its_journal(toy: Any) -> None:
    context = toy.context("sft")
    callback = PipelineCallback(context)
    for step in (1, 2, 3, 4):
        context.tracker.log({"sft/loss": float(step)}, step)
        (context.checkpoints / f"checkpoint-{step}").mkdir()
        call(callback, "on_save", step, output_dir=context.checkpoints)
    assert [path.name for path in sorted(context.checkpoints.iterdir())] == ["checkpoint-3", "checkpoint-4"]
    (context.checkpoints / "checkpoint-4" / MARK).write_text(json.dumps({"mark": 0}))  # torn

    again = toy.context("sft", tracker=JournalTracker(toy.journal()))
    assert supervised.resume_from(again) == context.checkpoints / "checkpoint-3"
    assert [path.name for path in context.checkpoints.iterdir()] == ["checkpoint-3"]
    assert [step for step, _ in toy.curves()] == [1, 2, 3]


def test_without_a_checkpoint_there_is_nothing_to_resume(toy: Any) -> None:
    context = toy.context("sft")
    (context.checkpoints / "checkpoint-1").mkdir()
    assert supervised.resume_from(context) is None
    assert checkpoints.latest(context.checkpoints) is None
    assert list(context.checkpoints.iterdir()) == []


def test_trainable_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    assert computing.trainable_parameters(model) == 4
