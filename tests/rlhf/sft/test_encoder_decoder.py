"""Supervised fine-tuning of encoder-decoders: the same stage, loss, order of rows and resume as of causal models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration, modeling_utils

from rlhf.config.model import Model
from rlhf.models import adapt, loading
from rlhf.ppo.checks import check_policy
from rlhf.ppo.policy import Policy
from rlhf.ppo.sequences import Sequences
from rlhf.prepare.random_weights import random_model
from rlhf.sft import stage as sft
from rlhf.training import computing, supervised

STEPS = {"batch_size": 24, "epochs": 2}  # 84 rows: 4 steps an epoch, the last one with 12 rows
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
SHAPE = {"d_model": 16, "max_position_embeddings": 48}
HALVES = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}


def make(kind: str, tokenizer: Any, dropout: float = 0.0) -> Any:
    """A tiny model; pad and end-of-sequence are the same token, and the decoder starts with it."""
    torch.manual_seed(1)
    if kind == "t5":
        size = {"layers": 1, "width": 16, "heads": 2, "context": 48, "vocab_size": 270}
        model = random_model(Model(init="random", architecture="t5", **size), tokenizer)
        model.config.dropout_rate = dropout
        return type(model)(model.config)
    ids = dict.fromkeys(SPECIAL, tokenizer.eos_token_id)
    parts = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in HALVES.items()}
    return BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), **SHAPE, **parts, **ids, dropout=dropout))


@pytest.fixture(params=["t5", "bart"])
def pair(request: pytest.FixtureRequest, toy: Any, tmp_path: Path) -> Any:
    """The toy pipeline with an encoder-decoder."""
    return with_model(request.param, toy, tmp_path)


def with_model(kind: str, toy: Any, place: Path, dropout: float = 0.0) -> Any:
    shared = shutil.copytree(toy.shared, place / "shared")
    tokenizer = loading.load_tokenizer(shared / "prepare/base")
    shutil.rmtree(shared / "prepare/base")
    loading.save(make(kind, tokenizer, dropout), tokenizer, shared / "prepare/base")
    return type(toy)(shared, place)


def base(toy: Any) -> Any:
    return loading.load_policy(toy.shared / "prepare/base")


def weights(context: Any) -> bytes:
    content: bytes = (context.out / "model/model.safetensors").read_bytes()
    return content


def examples(toy: Any, split: str = "train") -> list[tuple[list[int], list[int]]]:
    """Prompt ids and response ids, tokenized by hand."""
    tokenizer = loading.load_tokenizer(toy.shared / "prepare/base")
    table = pq.read_table(toy.shared / f"prepare/demonstrations/{split}.parquet").to_pylist()
    return [
        (tokenizer(row["prompt"])["input_ids"], [*tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id])
        for row in table
    ]


def row_loss(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Sum of -log p of one response, by the model's own labels and its own shift, without padding."""
    loss: torch.Tensor = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([response])).loss
    return loss * len(response)


def mean_loss(model: Any, rows: list[tuple[list[int], list[int]]]) -> float:
    with torch.no_grad():
        total = sum(row_loss(model, *row).item() for row in rows)
    return total / sum(len(response) for _, response in rows)


# ------------------------------------------------------------------------------------------------------------- loss
def test_rows_are_what_a_rollout_has(pair: Any) -> None:
    tokenizer = loading.load_tokenizer(pair.shared / "prepare/base")
    rows = sft.read_rows(pair.shared / "prepare/demonstrations/train.parquet", tokenizer, encoder=True)
    assert rows == examples(pair)
    assert all(row.labels[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id for row in rows)


def test_loss_is_the_models_own_of_each_row_alone(pair: Any) -> None:
    rows = [sft.Row(*row) for row in examples(pair)]
    expected = mean_loss(base(pair), examples(pair))
    for size in (1, 5, 84):
        assert sft.mean_loss(base(pair), rows, size) == pytest.approx(expected, rel=1e-5)


def test_loss_is_that_of_ppos_logprobs(pair: Any) -> None:
    """What SFT raises is what PPO's ratio is of: the probability of the same tokens after the same beginnings."""
    prompts, responses = zip(*examples(pair)[:8], strict=True)
    lengths = [torch.tensor([len(row) for row in part]) for part in (prompts, responses)]
    ids = [supervised.padded(part, 7) for part in (prompts, responses)]
    found = Policy(base(pair))(Sequences(ids[0], lengths[0], ids[1], lengths[1]), 1.0).logprobs
    inputs = sft.collate([sft.Row(*row)._asdict() for row in zip(prompts, responses, strict=True)])
    total, count = sft.response_loss(base(pair), inputs)
    assert count == len(found)
    assert total.item() == pytest.approx(-found.sum().item(), rel=1e-5)


@pytest.mark.parametrize("micro", [24, 6])
def test_first_step_is_that_of_a_hand_loop(pair: Any, micro: int) -> None:
    section = {"batch_size": 24, "micro_batch_size": micro, "max_steps": 1, "log_every": 1, "warmup_fraction": 0.0}
    context = pair.context("sft", sft=section)
    sft.run(context)

    model, rows = base(pair), examples(pair)
    sampler = supervised.LengthGroupedSampler([len(prompt) + len(response) for prompt, response in rows], 24, seed=3)
    batch = [rows[i] for i in list(sampler)[:24]]
    loss = sum(row_loss(model, *row) for row in batch) / sum(len(response) for _, response in batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

    (step, logged), _ = pair.curves()
    assert step == 1
    assert logged == pytest.approx(
        {"sft/loss": loss.item(), "sft/grad_norm": norm.item(), "sft/learning_rate": 1e-2}, rel=1e-4
    )
    gradients = [p.grad for p in model.parameters()]
    trained = loading.load_policy(context.out / "model")
    for (name, mine), theirs, gradient in zip(model.named_parameters(), trained.parameters(), gradients, strict=True):
        sure = gradient.abs() > 1e-5  # Adam's first step is the sign: of a gradient near 0 it is chance
        assert torch.allclose(mine[sure], theirs[sure], atol=2e-5), name


# --------------------------------------------------------------------------------------------------------- training
def test_learns_to_copy_and_every_later_stage_opens_it(pair: Any, capfd: pytest.CaptureFixture[str]) -> None:
    context = pair.context("sft", sft={"epochs": 18})
    finals = sft.run(context)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    model = AutoModelForSeq2SeqLM.from_pretrained(context.out / "model")
    held_out = examples(pair, "validation")
    assert mean_loss(model, held_out) < min(1.2, mean_loss(base(pair), held_out) - 2)
    assert finals["sft/validation_loss"] == pytest.approx(mean_loss(model, held_out), rel=1e-5)
    assert finals["sft/tokens"] == sum(len(response) for _, response in examples(pair))
    assert finals["sft/trainable_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert [path.name for path in context.out.iterdir()] == ["model"]
    check_policy(Policy(loading.load_policy(context.out / "model").eval()))


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("lora", [0, 2])
def test_resumes_bit_identically(kind: str, lora: int, toy: Any, tmp_path: Path) -> None:
    pair = with_model(kind, toy, tmp_path, dropout=0.2)  # what it draws must go on where it was
    options: dict[str, Any] = {"sft": STEPS, "model": {"lora_rank": lora}}
    whole = pair.context("sft", run="whole", **options)
    finals = sft.run(whole)
    for step in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            sft.run(pair.context("sft", tracker=pair.killer("run", step), **options))
    again = pair.context("sft", **options)
    assert (sft.run(again), weights(again), pair.curves()) == (finals, weights(whole), pair.curves("whole"))


def test_lora_is_merged_into_the_saved_model(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[0, 8, 9]])}
    adapted: list[torch.Tensor] = []
    original = adapt.merge_lora

    def merge(model: Any) -> Any:
        adapted.append(model.eval()(**inputs).logits)
        return original(model)

    monkeypatch.setattr(adapt, "merge_lora", merge)
    context = pair.context("sft", sft={"max_steps": 4}, model={"lora_rank": 2})
    finals = sft.run(context)
    saved = loading.load_policy(context.out / "model")
    assert torch.allclose(saved(**inputs).logits, adapted[0], atol=1e-5)
    assert not torch.allclose(saved(**inputs).logits, base(pair)(**inputs).logits, atol=1e-3)
    assert finals["sft/trainable_parameters"] < computing.trainable_parameters(base(pair)) / 2
    assert {path.name for path in (context.out / "model").iterdir()} == {
        path.name for path in (pair.shared / "prepare/base").iterdir()
    }


# -------------------------------------------------------------------------------------------- gradient checkpointing
@pytest.mark.parametrize("kind", ["gpt2", "t5", "bart"])
@pytest.mark.parametrize("lora", [0, 2])
def test_gradient_checkpointing_changes_nothing(
    kind: str, lora: int, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout too: a block that is computed again draws what it drew before."""
    pair = toy if kind == "gpt2" else with_model(kind, toy, tmp_path, dropout=0.2)
    calls: list[int] = []
    original = modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    section = {"max_steps": 3, "log_every": 1}
    found, used = [], []
    for on in (False, True):
        calls.clear()
        model = {"lora_rank": lora, "gradient_checkpointing": on}
        context = pair.context("sft", run=f"checkpointing {on}", sft=section, model=model)
        sft.run(context)
        used.append(len(calls))
        found.append((pair.curves(f"checkpointing {on}"), loading.load_policy(context.out / "model").state_dict()))
    layers = {"gpt2": 2, "t5": 2, "bart": 2}[kind]  # an encoder-decoder has one in each half
    assert used == [0, 3 * layers]
    (curves, one), (others, other) = found
    for (step, values), (its_step, its_values) in zip(curves, others, strict=True):
        assert (step, values) == (its_step, pytest.approx(its_values, rel=1e-5))
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-5, atol=1e-6, msg=name)
