"""Reward-model training: what is scored, how well, on which scale, and that a kill changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from rlhf.errors import DataError, StoppedError, TrainingError
from rlhf.models import adapt, loading
from rlhf.reward import accuracy, stage as reward, trainer
from rlhf.reward.accuracy import Scores
from rlhf.reward.rows import Pairs, token_rows
from rlhf.rewards import RewardModel
from rlhf.store import checkpoints
from rlhf.training import computing, supervised

FEW = {"max_steps": 4}
NOTHING = Scores(np.zeros(0), np.zeros(0))


def pairs_of(chosen: list[list[int]], rejected: list[list[int]]) -> Pairs:
    """Pairs without margins, each one a ranking."""
    n = len(chosen)
    return Pairs(chosen, rejected, [0.0] * n, list(range(n)), [False] * n)


def table(toy: Any, kind: str, split: str) -> dict[str, list[str]]:
    columns: dict[str, list[str]] = pq.read_table(toy.shared / "prepare" / kind / f"{split}.parquet").to_pydict()
    return columns


def rows_of(toy: Any, split: str, side: str, model: Any) -> list[list[int]]:
    columns = table(toy, "preferences", split)
    texts = [prompt + response for prompt, response in zip(columns["prompt"], columns[side], strict=True)]
    return token_rows(texts, loading.load_tokenizer(toy.shared / "sft/model"), model, "here")


def classifier(toy: Any) -> Any:
    """A fresh classifier, its padding set as in training."""
    torch.manual_seed(0)
    model = loading.reward_from_policy(toy.shared / "sft/model")
    model.config.pad_token_id = 1
    return model


@torch.no_grad()
def by_hand(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Row by row without padding: trunk, last position, head."""
    hidden = [model.transformer(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    scores: torch.Tensor = model.score(torch.stack(hidden))[:, 0]
    return scores


def weights(context: Any) -> bytes:
    content: bytes = (context.out / "model/model.safetensors").read_bytes()
    return content


@pytest.fixture(scope="module")
def few(shared_toy: Any) -> Any:
    """The context of a short training."""
    context = shared_toy.context("reward", run="few", reward=FEW)
    reward.run(context)
    return context


@pytest.fixture(scope="module")
def learnt(shared_toy: Any) -> Any:
    """The context of a long training, and what it logged."""
    context = shared_toy.context("reward", run="learnt")
    reward.run(context)
    return context, shared_toy.curves("learnt")


@pytest.fixture(scope="module")
def uninterrupted(shared_toy: Any) -> Callable[[int], tuple[dict[str, float], bytes, Any]]:
    """Of a training that nothing interrupts, with adapters of a rank: figures, weights and what it logged."""

    @cache
    def run(lora_rank: int) -> tuple[dict[str, float], bytes, Any]:
        context = shared_toy.context("reward", run=f"rank {lora_rank}", **options_of(lora_rank))
        finals = reward.run(context)
        return finals, weights(context), shared_toy.curves(f"rank {lora_rank}")

    return run


def options_of(lora_rank: int) -> dict[str, Any]:
    return {"reward": {"max_steps": 5, "batch_size": 42}, "model": {"lora_rank": lora_rank}}


# ---------------------------------------------------------------------------------------------------------- scoring
def test_texts_end_with_end_of_sequence_once(toy: Any) -> None:
    tokenizer = loading.load_tokenizer(toy.shared / "sft/model")
    ids = tokenizer("ant bee")["input_ids"]
    rows = token_rows(["ant bee", "ant bee" + tokenizer.eos_token], tokenizer, classifier(toy), "here")
    assert rows == [[*ids, tokenizer.eos_token_id]] * 2
    assert token_rows([], tokenizer, classifier(toy), "here") == []


def test_scores_are_read_at_the_last_token_though_it_pads_too(toy: Any) -> None:
    model = classifier(toy)
    rows = rows_of(toy, "train", "chosen", model)
    assert {row[-1] for row in rows} == {loading.load_tokenizer(toy.shared / "sft/model").pad_token_id}
    assert len({len(row) for row in rows}) > 2  # so batches have padding
    for size in (1, 7, len(rows)):
        assert reward.raw_scores(model, rows, size) == pytest.approx(by_hand(model, rows).numpy(), abs=1e-5)


def test_the_trainer_reads_the_same_scores(toy: Any) -> None:
    """One step on all pairs logs loss, accuracy and margin of the untrained model, with and without centring."""
    for center in (0.0, 0.5):
        section = {"max_steps": 1, "batch_size": 84, "log_every": 1, "center": center}
        context = toy.context("reward", run=f"center {center}", reward=section)
        computing.seed_everything(3)
        model = loading.reward_from_policy(toy.shared / "sft/model")
        chosen, rejected = (by_hand(model, rows_of(toy, "train", side, model)) for side in ("chosen", "rejected"))
        loss = -F.logsigmoid(chosen - rejected).mean() + center * ((chosen + rejected) ** 2).mean()
        reward.run(context)
        logged = {name: value for _, values in toy.curves(f"center {center}") for name, value in values.items()}
        assert logged["reward/loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert logged["reward/accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
        assert logged["reward/margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-4)
        assert logged["reward/score_mean"] == pytest.approx(torch.cat([chosen, rejected]).mean().item(), rel=1e-4)


def test_a_text_longer_than_the_context_is_named(toy: Any) -> None:
    model, tokenizer = classifier(toy), loading.load_tokenizer(toy.shared / "sft/model")
    assert [len(row) for row in token_rows(["!" * 47], tokenizer, model, "there")] == [48]
    with pytest.raises(DataError, match=r"there, row 2: .* 49 tokens, .* at most 48; lower data.max_prompt_tokens"):
        token_rows(["ant", "!" * 48], tokenizer, model, "there")


# ---------------------------------------------------------------------------------------------------------- figures
def test_figures_by_hand() -> None:
    scores = Scores(np.array([2.0, 0.0, 1.0, -1.0]), np.array([1.0, 0.0, 3.0, -2.0]))
    assert accuracy.wins(scores).tolist() == [1.0, 0.5, 0.0, 1.0]
    losses = [math.log1p(math.exp(-margin)) for margin in (1, 0, -2, 1)]
    assert accuracy.pair_loss(scores) == pytest.approx(sum(losses) / 4)
    assert accuracy.pair_loss(Scores(np.array([1e4]), np.array([-1e4]))) == 0.0
    assert accuracy.pair_loss(Scores(np.array([-1e4]), np.array([1e4]))) == 2e4
    assert accuracy.pair_report(NOTHING, NOTHING, [], 0, probabilities=True) is None
    assert accuracy.finals(None, None) == {}


def test_interval_of_the_accuracy() -> None:
    """For 300 of 400 pairs: the normal interval of a share, 0.75 +- 1.96 sqrt(0.75 * 0.25 / 400)."""
    scores = Scores(np.repeat([1.0, -1.0], [300, 100]), np.zeros(400))
    report = accuracy.pair_report(scores, Scores(np.ones(400), np.ones(400)), [True] * 400, 1, probabilities=True)
    metrics = accuracy.finals(report, None)
    assert metrics["test_accuracy"] == 0.75
    assert metrics["test_accuracy_low"] == pytest.approx(0.7076, abs=0.01)
    assert metrics["test_accuracy_high"] == pytest.approx(0.7924, abs=0.01)


def test_score_pairs_keeps_the_order(toy: Any) -> None:
    model = classifier(toy)
    pairs = pairs_of(rows_of(toy, "test", "chosen", model), rows_of(toy, "test", "rejected", model))
    scores = reward.score_pairs(model, pairs, 3)
    assert scores.chosen == pytest.approx(reward.raw_scores(model, pairs.chosen, 1), abs=1e-5)
    assert scores.rejected == pytest.approx(reward.raw_scores(model, pairs.rejected, 1), abs=1e-5)
    assert len(reward.score_pairs(model, pairs_of([], []), 3).chosen) == 0


# --------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("normalize_std", [False, True])
def test_learns_and_is_normalised(toy: Any, capfd: pytest.CaptureFixture[str], normalize_std: bool) -> None:
    context = toy.context("reward", reward={"normalize_std": normalize_std})
    finals = reward.run(context)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert finals["reward/test_accuracy"] > 0.9
    assert finals["reward/test_accuracy_low"] <= finals["reward/test_accuracy"] <= finals["reward/test_accuracy_high"]
    assert finals["reward/test_loss"] < 0.3
    assert finals["reward/train_pairs"] == 84

    model, tokenizer = loading.load_reward_model(context.out / "model"), loading.load_tokenizer(context.out / "model")
    scorer = RewardModel(model, tokenizer)
    columns = table(toy, "demonstrations", "train")
    references = np.array(scorer(columns["prompt"], columns["response"], {}))
    assert references.mean() == pytest.approx(0.0, abs=1e-5)
    assert (references.std() == pytest.approx(1.0, abs=1e-5)) == normalize_std
    assert (finals["reward/score_std"] == 1.0) != normalize_std
    assert (model.config.score_mean, model.config.score_std) == (
        finals["reward/score_mean"],
        finals["reward/score_std"],
    )

    scores = pq.read_table(context.out / "scores.parquet").to_pylist()
    assert [row["split"] for row in scores] == ["test"] * 14 + ["train"] * 84
    test = table(toy, "preferences", "test")
    for side in ("chosen", "rejected"):
        expected = scorer(test["prompt"], test[side], {})
        assert [row[f"{side}_score"] for row in scores[:14]] == pytest.approx(expected, abs=1e-4)


def test_curves(learnt: Any) -> None:
    curves = learnt[1]
    assert [step for step, values in curves if "reward/validation_loss" in values] == [0, 11, 22]
    assert [step for step, values in curves if "reward/loss" in values] == list(range(2, 23, 2))
    assert all(set(values) == set(curves[1][1]) for _, values in curves if "reward/loss" in values)
    first, last = curves[0][1], curves[-1][1]
    assert first["reward/validation_loss"] == pytest.approx(math.log(2), abs=0.4)
    assert last["reward/validation_loss"] < 0.3
    assert last["reward/validation_accuracy"] > 0.9


def test_writes_a_model_and_scores_and_nothing_else(toy: Any, few: Any) -> None:
    assert {path.name for path in few.out.iterdir()} == {
        "model",
        "scores.parquet",
        "calibration.json",
        "calibration.png",
    }
    written = few.out / "model"
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in written.iterdir()} == expected
    tokenizers = [(place / "tokenizer.json").read_text() for place in (written, toy.shared / "sft/model")]
    assert tokenizers[0] == tokenizers[1]
    assert str(toy.shared) not in "".join(path.read_text() for path in written.glob("*.json"))
    assert json.loads((written / "config.json").read_text())["use_cache"]


def test_the_models_own_forward_gives_the_score_too(toy: Any, few: Any) -> None:
    """With padding by the configuration's id, which is why that one is not end-of-sequence."""
    model = loading.load_reward_model(few.out / "model")
    rows = rows_of(toy, "test", "chosen", model)
    ids = supervised.padded(rows, model.config.pad_token_id)
    with torch.no_grad():
        scores = model(ids).logits[:, 0].numpy() - model.config.score_mean
    columns = table(toy, "preferences", "test")
    expected = RewardModel(model, loading.load_tokenizer(few.out / "model"))(columns["prompt"], columns["chosen"], {})
    assert scores == pytest.approx(np.array(expected), abs=1e-5)


def test_pairs_come_from_the_judge_where_it_is_on(toy: Any, tmp_path: Path) -> None:
    context = toy.context("reward", reward=FEW)
    for split in ("train", "validation", "test"):
        columns = table(toy, "preferences", split)
        path = tmp_path / "judge/preferences" / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({name: values[:9] for name, values in columns.items()}), path)
    context.inputs["judge"] = tmp_path / "judge"
    assert reward.run(context)["reward/train_pairs"] == 9


def test_without_demonstrations_the_chosen_texts_are_the_references(toy: Any, tmp_path: Path) -> None:
    context = toy.context("reward", reward=FEW, sft={"enabled": False}, data={"preferences": "x", "prompts": "x"})
    (tmp_path / "prepare").mkdir()
    (tmp_path / "prepare/preferences").symlink_to(toy.shared / "prepare/preferences")
    (tmp_path / "prepare/base").symlink_to(toy.shared / "prepare/base")
    del context.inputs["sft"]
    context.inputs["prepare"] = tmp_path / "prepare"
    reward.run(context)
    columns = table(toy, "preferences", "train")
    model = loading.load_reward_model(context.out / "model")
    scores = RewardModel(model, loading.load_tokenizer(context.out / "model"))(columns["prompt"], columns["chosen"], {})
    assert np.mean(scores) == pytest.approx(0.0, abs=1e-5)


def test_a_reward_model_to_start_from_keeps_its_head(toy: Any, learnt: Any) -> None:
    first, curves = learnt
    reward.run(toy.context("reward", reward=FEW | {"path": str(first.out / "model")}))
    before, after = curves[-1][1], toy.curves()[0][1]
    assert after == pytest.approx(before, rel=1e-4)


# ---------------------------------------------------------------------------------------------- resuming, LoRA, NaN
@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("step", [1, 3, 4])
def test_resumes_bit_identically(toy: Any, uninterrupted: Any, step: int, lora_rank: int) -> None:
    options = options_of(lora_rank)
    with pytest.raises(KeyboardInterrupt):
        reward.run(toy.context("reward", tracker=toy.killer("run", step), **options))
    again = toy.context("reward", **options)
    assert (reward.run(again), weights(again), toy.curves()) == uninterrupted(lora_rank)


def test_asked_to_end_it_leaves_a_checkpoint(toy: Any, uninterrupted: Any) -> None:
    options = options_of(lora_rank=0)
    first = toy.context("reward", tracker=toy.asker(3), **options)
    with pytest.raises(StoppedError, match="reward: ended after step 3 of 5, as asked"):
        reward.run(replace(first, stop=first.tracker.stop))
    assert checkpoints.latest(first.checkpoints) == first.checkpoints / "checkpoint-3"
    again = toy.context("reward", **options)
    reward.run(again)
    assert weights(again) == uninterrupted(0)[1]


def test_lora_is_merged_with_its_head(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scores: list[Any] = []
    original = adapt.merge_lora
    rows = rows_of(toy, "test", "chosen", classifier(toy))

    def merge(model: Any) -> Any:
        scores.append(reward.raw_scores(model, rows, 4))
        return original(model)

    monkeypatch.setattr(adapt, "merge_lora", merge)
    context = toy.context("reward", reward=FEW, model={"lora_rank": 4})
    reward.run(context)
    saved = loading.load_reward_model(context.out / "model")
    assert reward.raw_scores(saved, rows, 4) == pytest.approx(scores[0], abs=1e-5)
    policy = loading.load_policy(toy.shared / "sft/model")
    assert torch.equal(saved.transformer.wte.weight, policy.transformer.wte.weight)
    assert not torch.equal(saved.transformer.h[0].mlp.c_fc.weight, policy.transformer.h[0].mlp.c_fc.weight)
    computing.seed_everything(3)
    assert not torch.equal(saved.score.weight, loading.reward_from_policy(toy.shared / "sft/model").score.weight)


def test_a_loss_that_is_not_finite_ends_training(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = trainer.Trainer.compute_loss

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs) * (math.inf if len(calls) == 3 else 1.0)

    monkeypatch.setattr(trainer.Trainer, "compute_loss", broken)
    context = toy.context("reward")
    with pytest.raises(TrainingError, match="reward: the loss is inf at step 3"):
        reward.run(context)
    assert checkpoints.latest(context.checkpoints) == context.checkpoints / "checkpoint-2"
