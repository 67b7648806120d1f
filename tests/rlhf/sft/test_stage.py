"""Supervised fine-tuning: what is learned from, what is not, and that a kill changes nothing."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from rlhf.errors import StoppedError, TrainingError
from rlhf.models import adapt, loading
from rlhf.sft import stage as sft
from rlhf.store import checkpoints
from rlhf.training import computing, supervised

STEPS = {"batch_size": 24, "epochs": 2}  # 84 rows: 4 steps an epoch, the last one with 12 rows


@pytest.fixture
def rows(toy: Any) -> list[sft.Row]:
    return sft.read_rows(train_file(toy), loading.load_tokenizer(toy.shared / "prepare/base"))


def train_file(toy: Any) -> Path:
    path: Path = toy.shared / "prepare/demonstrations/train.parquet"
    return path


def base(toy: Any) -> Any:
    return loading.load_policy(toy.shared / "prepare/base")


def weights(context: Any) -> bytes:
    content: bytes = (context.out / "model/model.safetensors").read_bytes()
    return content


def loss_by_hand(model: Any, rows: list[sft.Row]) -> float:
    """Row by row without padding, token by token."""
    total, count = 0.0, 0
    for ids, labels in rows:
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for position, label in enumerate(labels):
            if label != -100:
                total -= logprobs[position - 1, label].item()
                count += 1
    return total / count


# ------------------------------------------------------------------------------------------------------------- rows
def test_a_row_is_prompt_response_and_end_of_sequence(toy: Any, rows: list[sft.Row]) -> None:
    tokenizer = loading.load_tokenizer(toy.shared / "prepare/base")
    table = pq.read_table(train_file(toy)).to_pylist()
    assert len(rows) == len(table)
    for row, source in zip(rows, table, strict=True):
        prompt = loading.prompt_token_ids(tokenizer, [source["prompt"]])[0]
        response = tokenizer(source["response"])["input_ids"]
        assert row.input_ids == [*prompt, *response, tokenizer.eos_token_id]
        assert row.labels == [*[-100] * len(prompt), *response, tokenizer.eos_token_id]


def test_loss_counts_response_tokens_only(toy: Any, rows: list[sft.Row]) -> None:
    assert sft.mean_loss(base(toy), rows, 7) == pytest.approx(loss_by_hand(base(toy), rows), rel=1e-5)


def test_loss_does_not_depend_on_batches(toy: Any, rows: list[sft.Row]) -> None:
    losses = [sft.mean_loss(base(toy), rows, size) for size in (1, 5, 84)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_response_loss_of_an_empty_prompt_leaves_out_what_nothing_predicts(toy: Any) -> None:
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "attention_mask": torch.ones(1, 3),
        "labels": torch.tensor([[5, 6, 7]]),
    }
    total, count = sft.response_loss(base(toy), inputs)
    logits = base(toy)(input_ids=inputs["input_ids"]).logits[0, :2]
    assert count == 2
    assert total.item() == pytest.approx(
        F.cross_entropy(logits, torch.tensor([6, 7]), reduction="sum").item(), rel=1e-6
    )


# --------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("micro", [24, 8, 6])
def test_first_step_is_that_of_a_hand_loop(toy: Any, rows: list[sft.Row], micro: int) -> None:
    """One step of AdamW on the first batch, whatever the micro-batches; some of them have fewer tokens than others."""
    section = {"batch_size": 24, "micro_batch_size": micro, "max_steps": 1, "log_every": 1, "warmup_fraction": 0.0}
    context = toy.context("sft", sft=section)
    finals = sft.run(context)

    model = base(toy)
    sampler = supervised.LengthGroupedSampler([len(row.input_ids) for row in rows], 24, seed=3)
    batch = [rows[i] for i in list(sampler)[:24]]
    total = sum(
        F.cross_entropy(model(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[1:]), reduction="sum")
        for ids, labels in batch
    )
    loss = total / sum(label != -100 for row in batch for label in row.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

    (step, logged), _ = toy.curves()
    assert step == 1
    assert logged == pytest.approx(
        {"sft/loss": loss.item(), "sft/grad_norm": norm.item(), "sft/learning_rate": 1e-2}, rel=1e-4
    )
    assert finals["sft/final_loss"] == logged["sft/loss"]
    trained = loading.load_policy(context.out / "model")
    for (name, mine), theirs in zip(model.named_parameters(), trained.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-5), name


def test_every_row_is_trained_on_once_an_epoch(toy: Any, rows: list[sft.Row], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[tuple[int, ...]] = Counter()
    original = sft.response_loss

    def spy(model: Any, inputs: Any) -> Any:
        if torch.is_grad_enabled():
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                seen[tuple(ids[: int(mask.sum())].tolist())] += 1
        return original(model, inputs)

    monkeypatch.setattr(sft, "response_loss", spy)
    sft.run(toy.context("sft", sft=STEPS))
    assert seen == Counter({ids: 2 * n for ids, n in Counter(tuple(row.input_ids) for row in rows).items()})


def test_learns_and_reports(toy: Any, rows: list[sft.Row], capfd: pytest.CaptureFixture[str]) -> None:
    context = toy.context("sft", sft={"epochs": 3})
    finals = sft.run(context)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""

    tokenizer = loading.load_tokenizer(context.out / "model")
    held_out = sft.read_rows(toy.shared / "prepare/demonstrations/validation.parquet", tokenizer)
    before, after = (loss_by_hand(model, held_out) for model in (base(toy), loading.load_policy(context.out / "model")))
    assert before == pytest.approx(math.log(270), rel=0.1)  # of 270 tokens, it knows nothing
    assert after < before - 2
    assert finals["sft/validation_loss"] == pytest.approx(after, rel=1e-5)
    assert finals["sft/tokens"] == sum(label != -100 for row in rows for label in row.labels)
    assert finals["sft/trainable_parameters"] == sum(parameter.numel() for parameter in base(toy).parameters())
    curves = toy.curves()
    assert [step for step, values in curves if "sft/validation_loss" in values] == [11, 22, 33]
    assert [step for step, values in curves if "sft/loss" in values] == [*range(2, 33, 2), 33]
    assert curves[-1] == (33, {"sft/validation_loss": finals["sft/validation_loss"]})


def test_writes_an_ordinary_model_directory_and_nothing_else(toy: Any) -> None:
    context = toy.context("sft", sft={"max_steps": 1})
    sft.run(context)
    original, written = toy.shared / "prepare/base", context.out / "model"
    assert [path.name for path in context.out.iterdir()] == ["model"]
    assert {path.name for path in written.iterdir()} == {path.name for path in original.iterdir()}
    config, before = (json.loads((path / "config.json").read_text()) for path in (written, original))
    assert config == before
    assert str(toy.shared) not in "".join(path.read_text() for path in written.glob("*.json"))


def test_without_a_validation_split_there_is_no_validation_loss(toy: Any, tmp_path: Path) -> None:
    context = toy.context("sft", sft={"max_steps": 1})
    inputs = shutil.copytree(toy.shared / "prepare", tmp_path / "prepare")
    path = inputs / "demonstrations/validation.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    context.inputs["prepare"] = inputs
    assert "sft/validation_loss" not in sft.run(context)


# --------------------------------------------------------------------------------------------------------- resuming
@pytest.fixture(scope="module")
def shared_dropout(shared_toy: Any) -> Any:
    """The toy with dropout in its model: what it draws must go on where it was."""
    shared = shutil.copytree(shared_toy.shared, shared_toy.directory / "inputs")
    path = shared / "prepare/base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resid_pdrop": 0.2}))
    return type(shared_toy)(shared, shared_toy.directory)


@pytest.fixture
def dropout(shared_dropout: Any, tmp_path: Path) -> Any:
    return type(shared_dropout)(shared_dropout.shared, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(shared_dropout: Any) -> tuple[dict[str, float], bytes, Any]:
    context = shared_dropout.context("sft", run="whole", sft=STEPS)
    finals = sft.run(context)
    return finals, weights(context), shared_dropout.curves("whole")


def test_resumes_bit_identically_from_an_end_at_any_step(
    dropout: Any, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []
    monkeypatch.setattr(supervised.log, "info", lambda message, *args: starts.append(args[-1]))
    for step in range(1, 9):
        run = f"killed at {step}"
        with pytest.raises(KeyboardInterrupt):
            sft.run(dropout.context("sft", run=run, sft=STEPS, tracker=dropout.killer(run, step)))
        context = dropout.context("sft", run=run, sft=STEPS)
        assert (sft.run(context), weights(context), dropout.curves(run)) == uninterrupted, run
    assert starts == [2, 2, 4, 4, 6, 6]


@pytest.mark.parametrize("step", [1, 4, 7])
def test_asked_to_end_it_leaves_a_checkpoint_of_that_step(step: int, dropout: Any, uninterrupted: Any) -> None:
    """Also between the regular ones. The curve has one more point there, and the weights are the same bits."""
    first = dropout.context("sft", sft=STEPS, tracker=dropout.asker(step))
    with pytest.raises(StoppedError, match=f"sft: ended after step {step} of 8, as asked"):
        sft.run(replace(first, stop=first.tracker.stop))
    assert checkpoints.latest(first.checkpoints) == first.checkpoints / f"checkpoint-{step}"
    context = dropout.context("sft", sft=STEPS)
    finals = sft.run(context)
    assert weights(context) == uninterrupted[1]
    assert finals["sft/validation_loss"] == uninterrupted[0]["sft/validation_loss"]
    assert {at for at, _ in dropout.curves()} == {step, *(at for at, _ in uninterrupted[2])}
    assert (dropout.curves() == uninterrupted[2]) == (step == 4)  # where it logs and saves anyway


def test_a_stage_that_was_killed_after_training_does_not_train_again(dropout: Any, uninterrupted: Any) -> None:
    sft.run(dropout.context("sft", sft=STEPS))
    context = dropout.context("sft", sft=STEPS)
    assert (sft.run(context), weights(context), dropout.curves()) == uninterrupted


def test_resumes_twice_and_with_another_rhythm_of_checkpoints(dropout: Any, uninterrupted: Any) -> None:
    for step, every in ((3, 2), (7, 4)):
        section = STEPS | {"checkpoint_every": every}
        with pytest.raises(KeyboardInterrupt):
            sft.run(dropout.context("sft", sft=section, tracker=dropout.killer("run", step)))
    context = dropout.context("sft", sft=STEPS)
    assert (sft.run(context), weights(context), dropout.curves()) == uninterrupted


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "model.safetensors", "journal.json"])
def test_a_torn_checkpoint_is_passed_over(dropout: Any, uninterrupted: Any, name: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        sft.run(dropout.context("sft", sft=STEPS, tracker=dropout.killer("run", 7)))
    context = dropout.context("sft", sft=STEPS)
    (context.checkpoints / "checkpoint-6" / name).unlink()
    assert (sft.run(context), weights(context), dropout.curves()) == uninterrupted


def test_an_end_within_the_writing_of_a_checkpoint(
    dropout: Any, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoints.seal

    def seal(path: Path) -> None:
        if checkpoints.step_of(path) == 4:
            raise KeyboardInterrupt
        original(path)

    monkeypatch.setattr(checkpoints, "seal", seal)
    with pytest.raises(KeyboardInterrupt):
        sft.run(dropout.context("sft", sft=STEPS))
    monkeypatch.undo()
    context = dropout.context("sft", sft=STEPS)
    assert sorted(path.name for path in context.checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert (sft.run(context), weights(context), dropout.curves()) == uninterrupted


# ------------------------------------------------------------------------------------------------------------- LoRA
def test_lora_is_merged_into_the_saved_model(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    adapted: list[torch.Tensor] = []
    original = adapt.merge_lora

    def merge(model: Any) -> Any:
        adapted.append(model.eval()(input_ids=ids).logits)
        return original(model)

    monkeypatch.setattr(adapt, "merge_lora", merge)
    context = toy.context("sft", sft={"max_steps": 4}, model={"lora_rank": 2})
    finals = sft.run(context)
    saved = loading.load_policy(context.out / "model")
    assert torch.allclose(saved(input_ids=ids).logits, adapted[0], atol=1e-5)
    assert not torch.allclose(saved(input_ids=ids).logits, base(toy)(input_ids=ids).logits, atol=1e-3)
    assert torch.equal(saved.transformer.wte.weight, base(toy).transformer.wte.weight)  # no adapter there
    assert finals["sft/trainable_parameters"] < computing.trainable_parameters(base(toy)) / 3
    assert {path.name for path in (context.out / "model").iterdir()} == {
        path.name for path in (toy.shared / "prepare/base").iterdir()
    }


def test_lora_resumes_bit_identically(toy: Any) -> None:
    options: dict[str, Any] = {"sft": {"max_steps": 4}, "model": {"lora_rank": 2}}
    whole = toy.context("sft", run="whole", **options)
    sft.run(whole)
    with pytest.raises(KeyboardInterrupt):
        sft.run(toy.context("sft", tracker=toy.killer("run", 3), **options))
    again = toy.context("sft", **options)
    sft.run(again)
    assert weights(again) == weights(whole)
    assert toy.curves() == toy.curves("whole")


# ------------------------------------------------------------------------------------------------------ not finite
def test_a_loss_that_is_not_finite_ends_training(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = sft.response_loss, []

    def broken(model: Any, inputs: Any) -> Any:
        total, count = original(model, inputs)
        calls.append(1)
        return (total * math.nan if len(calls) == 3 else total), count

    monkeypatch.setattr(sft, "response_loss", broken)
    context = toy.context("sft", sft={"checkpoint_every": 2})
    with pytest.raises(TrainingError, match="sft: the loss is nan at step 3"):
        sft.run(context)
    assert checkpoints.latest(context.checkpoints) == context.checkpoints / "checkpoint-2"
    assert [step for step, _ in toy.curves()] == [2]


def test_a_gradient_that_is_not_finite_is_in_no_checkpoint(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = sft.response_loss, []

    def broken(model: Any, inputs: Any) -> Any:
        total, count = original(model, inputs)
        calls.append(1)
        return (total + (0.0 * total).sqrt() if len(calls) == 4 else total), count  # sqrt'(0) is infinite

    monkeypatch.setattr(sft, "response_loss", broken)
    context = toy.context("sft", sft={"checkpoint_every": 2})
    with pytest.raises(TrainingError, match=r"sft: the grad_norm is (nan|inf) at step 4"):
        sft.run(context)
    assert checkpoints.latest(context.checkpoints) == context.checkpoints / "checkpoint-2"
