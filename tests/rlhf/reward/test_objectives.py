"""What a reward model learns from: margins, rankings, ratings; and that every row is trained on."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from rlhf.config.supervised import Reward
from rlhf.errors import DataError, TrainingError
from rlhf.models import loading
from rlhf.reward import rows, stage as reward, trainer
from rlhf.reward.rows import Pairs, Ratings
from rlhf.rewards import RewardModel
from rlhf.stages import STAGES, stage_inputs
from rlhf.training import computing

SPLITS = ("train", "validation", "test")
WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]


def write(place: Path, kind: str, split: str, columns: dict[str, Any]) -> None:
    path = place / kind / f"{split}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def preferences(toy: Any, split: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = pq.read_table(toy.shared / f"prepare/preferences/{split}.parquet").to_pydict()
    return columns


def with_prepare(toy: Any, context: Any, place: Path) -> Any:
    """The context with another ``prepare``, which has nothing yet but the base model."""
    place.mkdir(parents=True)
    (place / "base").symlink_to(toy.shared / "prepare/base")
    context.inputs["prepare"] = place
    return context


def rankings(sizes: list[int]) -> dict[str, list[Any]]:
    """Rankings of the given numbers of responses: the more often it says ``ant``, the better."""
    found: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": [], "ranking": []}
    for number, size in enumerate(sizes):
        responses = [" ".join(["ant"] * (size - i) + ["no"] * i) for i in range(size)]
        for better, worse in combinations(responses, 2):
            row = (f"{WORDS[number % 8]}\n", better, worse, 7 * number)
            for column, value in zip(found.values(), row, strict=True):
                column.append(value)
    return found


def ratings(toy: Any, split: str) -> dict[str, list[Any]]:
    """Chosen texts are rated about 8, rejected ones about 4."""
    columns = preferences(toy, split)
    scores = [8.0 + i % 2 for i in range(len(columns["chosen"]))] + [4.0 - i % 2 for i in range(len(columns["chosen"]))]
    return {"prompt": columns["prompt"] * 2, "response": columns["chosen"] + columns["rejected"], "score": scores}


def logged(toy: Any, run: str = "run") -> dict[str, float]:
    return {name: value for _, values in toy.curves(run) for name, value in values.items()}


def score(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """One text without padding, in float64 from the model's float32."""
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logit: torch.Tensor = model.score(model.transformer(torch.tensor([ids])).last_hidden_state[0, -1])[0]
    return logit.double()


# ---------------------------------------------------------------------------------------------------------- margins
def test_the_trainer_subtracts_margins_and_takes_null_for_none(toy: Any, tmp_path: Path) -> None:
    columns = preferences(toy, "train")
    n = len(columns["chosen"])
    margins = [None if i % 3 == 0 else 0.5 * (i % 4) for i in range(n)]
    context = toy.context("reward", reward={"max_steps": 1, "batch_size": n, "log_every": 1})
    with_prepare(toy, context, tmp_path / "other")
    write(tmp_path / "other", "preferences", "train", columns | {"margin": pa.array(margins, pa.float64())})
    computing.seed_everything(3)
    model, tokenizer = (
        loading.reward_from_policy(toy.shared / "sft/model"),
        loading.load_tokenizer(toy.shared / "sft/model"),
    )
    total = 0.0
    for prompt, chosen, rejected, margin in zip(
        columns["prompt"], columns["chosen"], columns["rejected"], margins, strict=True
    ):
        difference = score(model, tokenizer, prompt + chosen) - score(model, tokenizer, prompt + rejected)
        total -= F.logsigmoid(difference - (margin or 0.0)).item()
    finals = reward.run(context)
    assert logged(toy)["reward/loss"] == pytest.approx(total / n, rel=1e-4)
    assert finals["reward/train_pairs"] == n
    assert "reward/test_loss" not in finals  # there is no test split
    assert json.loads((context.out / "calibration.json").read_text())["pairs"] is None


# --------------------------------------------------------------------------------------------------------- rankings
def test_the_trainer_weighs_rankings_the_same(toy: Any, tmp_path: Path) -> None:
    columns = rankings([4, 2, 3, 2])
    context = toy.context("reward", reward={"max_steps": 1, "batch_size": 24, "log_every": 1})
    with_prepare(toy, context, tmp_path / "other")
    write(tmp_path / "other", "preferences", "train", columns)
    computing.seed_everything(3)
    model, tokenizer = (
        loading.reward_from_policy(toy.shared / "sft/model"),
        loading.load_tokenizer(toy.shared / "sft/model"),
    )
    of_ranking: dict[int, list[float]] = {}
    for prompt, chosen, rejected, number in zip(*columns.values(), strict=True):
        difference = score(model, tokenizer, prompt + chosen) - score(model, tokenizer, prompt + rejected)
        of_ranking.setdefault(number, []).append(-F.logsigmoid(difference).item())
    assert [len(found) for found in of_ranking.values()] == [6, 1, 3, 1]
    reward.run(context)
    assert logged(toy)["reward/loss"] == pytest.approx(np.mean([np.mean(x) for x in of_ranking.values()]), rel=1e-4)


def test_learns_from_rankings_and_resumes(toy: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reward": {"max_steps": 8, "batch_size": 12, "micro_batch_size": 6}}

    def context(run: str, tracker: Any = None) -> Any:
        made = toy.context("reward", run=run, tracker=tracker, **options)
        made.inputs["prepare"] = tmp_path / "other"
        return made

    with_prepare(toy, toy.context("reward", run="unused"), tmp_path / "other")
    for split in SPLITS:
        write(tmp_path / "other", "preferences", split, rankings([4, 3, 2, 4, 4, 3, 2, 4, 4, 4]))
    finals = reward.run(context("whole"))
    assert finals["reward/test_accuracy"] > 0.9
    with pytest.raises(KeyboardInterrupt):
        reward.run(context("run", toy.killer("run", 5)))
    assert reward.run(context("run")) == finals
    assert toy.curves() == toy.curves("whole")


def test_a_ranking_is_one_row_with_each_response_once(toy: Any) -> None:
    a, b, c, d, e = ([i] for i in range(5))
    dataset = rows.ranking_dataset(
        Pairs([a, a, b, d], [b, c, c, [*e, 0]], [0.0, 1.0, 0.5, 0.0], [0, 0, 0, 1], [True] * 4)
    )
    assert dataset.to_list() == [
        {"texts": [a, b, c], "chosen": [0, 0, 1], "rejected": [1, 2, 2], "margin": [0.0, 1.0, 0.5], "length": 1},
        {"texts": [d, [4, 0]], "chosen": [0], "rejected": [1], "margin": [0.0], "length": 2},
    ]
    batch = trainer.collate_rankings(dataset.to_list(), pad_token_id=9)
    assert batch["input_ids"].tolist() == [[0, 9], [1, 9], [2, 9], [3, 9], [4, 0]]
    assert batch["attention_mask"].tolist() == [[1, 0]] * 4 + [[1, 1]]
    assert (batch["chosen"].tolist(), batch["rejected"].tolist()) == ([0, 0, 1, 3], [1, 2, 2, 4])
    assert batch["weight"].tolist() == pytest.approx([1 / 6] * 3 + [1 / 2])


def test_a_batch_is_a_number_of_rankings(caplog: pytest.LogCaptureFixture) -> None:
    def sizes(batch: int, micro: int | None, pairs: int) -> tuple[int, int | None]:
        section = trainer.rankings_a_step(Reward(batch_size=batch, micro_batch_size=micro), pairs)
        return section.batch_size, section.micro_batch_size

    assert sizes(32, 8, 1) == (32, 8)
    assert sizes(32, None, 1) == (32, 32)
    assert sizes(32, 8, 3) == (10, 2)  # two rankings of three pairs in a forward pass, five times: 30 pairs
    assert sizes(32, None, 6) == (5, 5)
    assert caplog.text == ""
    assert sizes(32, 8, 10) == (3, 1)
    assert sizes(4, None, 6) == (1, 1)
    assert "the largest ranking has 10 pairs, more than the 8 of a forward pass" in caplog.text


def test_numbers_of_rankings() -> None:
    assert rows.ranking_numbers([4, 4, None, None, 2, 2, 9], "here") == [0, 0, 1, 2, 3, 3, 4]
    assert rows.ranking_numbers([], "here") == []
    with pytest.raises(
        DataError, match=r"here, row 4: ranking 4 goes on after rows of other rankings; .* next to each"
    ):
        rows.ranking_numbers([4, 4, 2, 4], "here")


# ---------------------------------------------------------------------------------------------------------- ratings
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_learns_from_ratings(toy: Any, tmp_path: Path, lora_rank: int) -> None:
    context = toy.context(
        "reward",
        reward={"objective": "regression", "epochs": 12 if lora_rank else 4},
        model={"lora_rank": lora_rank},
        judge={"enabled": False},
    )
    with_prepare(toy, context, tmp_path / "other")
    for split in SPLITS:
        write(tmp_path / "other", "ratings", split, ratings(toy, split))
    finals = reward.run(context)
    given = np.array(ratings(toy, "train")["score"])
    assert finals["reward/train_ratings"] == 168
    assert finals["reward/test_pearson"] > 0.8
    assert finals["reward/test_spearman"] > 0.6
    assert finals["reward/test_loss"] < 0.4
    assert finals["reward/test_mse"] == pytest.approx(finals["reward/test_loss"] * given.var())
    assert not [name for name in finals if "accuracy" in name or "ece" in name]
    first, last = (v for _, v in (toy.curves()[0], toy.curves()[-1]))
    assert last["reward/validation_loss"] == pytest.approx(finals["reward/test_loss"], abs=0.3)
    assert last["reward/validation_loss"] < first["reward/validation_loss"]
    assert "reward/accuracy" not in logged(toy)

    model = loading.load_reward_model(context.out / "model")
    assert (model.config.rating_mean, model.config.rating_std) == pytest.approx((given.mean(), given.std()))
    columns = ratings(toy, "test")
    scores = np.array(
        RewardModel(model, loading.load_tokenizer(context.out / "model"))(columns["prompt"], columns["response"], {})
    )
    written = pq.read_table(context.out / "ratings.parquet").to_pydict()
    assert written["split"] == ["test"] * 28 + ["train"] * 168
    assert written["rating"][:28] == columns["score"]
    assert written["score"][:28] == pytest.approx(scores, abs=1e-4)
    back = (
        scores * model.config.score_std + model.config.score_mean
    ) * model.config.rating_std + model.config.rating_mean
    assert np.mean((back - columns["score"]) ** 2) == pytest.approx(finals["reward/test_mse"], rel=1e-3)
    assert not (context.out / "scores.parquet").exists()
    assert not (context.out / "calibration.png").exists()


def test_the_loss_of_the_trainer_is_the_squared_error(toy: Any, tmp_path: Path) -> None:
    columns = {name: values[::12] for name, values in ratings(toy, "train").items()}
    n = len(columns["score"])
    context = toy.context("reward", reward={"objective": "regression", "max_steps": 1, "batch_size": n, "log_every": 1})
    with_prepare(toy, context, tmp_path / "other")
    write(tmp_path / "other", "ratings", "train", columns)
    computing.seed_everything(3)
    model, tokenizer = (
        loading.reward_from_policy(toy.shared / "sft/model"),
        loading.load_tokenizer(toy.shared / "sft/model"),
    )
    mean = sum(columns["score"]) / n
    std = math.sqrt(sum((given - mean) ** 2 for given in columns["score"]) / n)
    total = 0.0
    for prompt, response, given in zip(*columns.values(), strict=True):
        total += (score(model, tokenizer, prompt + response).item() - (given - mean) / std) ** 2
    reward.run(context)
    assert logged(toy)["reward/loss"] == pytest.approx(total / n, rel=1e-4)


def test_each_kind_is_measured_where_it_is_there(toy: Any, tmp_path: Path) -> None:
    """Ratings beside pairs; the judge's files before those of ``prepare``."""
    context = toy.context("reward", reward={"epochs": 2})
    with_prepare(toy, context, tmp_path / "other")
    (tmp_path / "other/preferences").symlink_to(toy.shared / "prepare/preferences")
    write(tmp_path / "other", "ratings", "test", ratings(toy, "test"))
    write(tmp_path / "judge", "preferences", "train", {k: v[:60] for k, v in preferences(toy, "train").items()})
    for split in SPLITS[1:]:
        write(tmp_path / "judge", "preferences", split, preferences(toy, split))
    context.inputs["judge"] = tmp_path / "judge"
    finals = reward.run(context)
    assert finals["reward/train_pairs"] == 60
    assert {"reward/test_ece", "reward/test_loss", "reward/test_spearman"} <= finals.keys()
    assert "reward/test_mse" not in finals  # the logit of a pairwise model has no unit
    assert finals["reward/test_pearson"] > 0.5
    made = json.loads((context.out / "calibration.json").read_text())
    assert made["pairs"]["loss"] == finals["reward/test_loss"]
    assert made["pairs"]["calibration"]["error"] == finals["reward/test_ece"]
    assert sum(of["pairs"] for of in made["pairs"]["calibration"]["bins"]) == 14
    assert sum(of["n"] for of in made["pairs"]["by_length"]) == 14
    assert (context.out / "calibration.png").read_bytes().startswith(b"\x89PNG")
    scores = pq.read_table(context.out / "scores.parquet", filters=[("split", "==", "test")]).to_pydict()
    difference = np.subtract(scores["chosen_score"], scores["rejected_score"])
    assert np.logaddexp(0, -difference).mean() == pytest.approx(finals["reward/test_loss"])


def test_nothing_to_learn_from_is_said(toy: Any, tmp_path: Path) -> None:
    context = toy.context("reward", reward={"objective": "regression"})
    with pytest.raises(DataError, match="objective is regression, but there are no ratings to train on"):
        reward.run(context)
    with_prepare(toy, context, tmp_path / "other")
    write(tmp_path / "other", "ratings", "train", ratings(toy, "train") | {"score": [3.0] * 168})
    with pytest.raises(DataError, match=r"all 168 scores are 3.0, so there is nothing to learn"):
        reward.run(context)


def test_a_regression_has_no_centre() -> None:
    with pytest.raises(ValidationError, match=r"center is 0.1, but it is for pairs"):
        Reward(objective="regression", center=0.1)


# --------------------------------------------------------------------------------------------- every row, its inputs
def test_every_row_is_trained_on_once_an_epoch(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    original = trainer.Trainer.compute_loss

    def record(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        for chosen, rejected in zip(inputs["chosen"], inputs["rejected"], strict=True):
            texts = [inputs["input_ids"][i][inputs["attention_mask"][i].bool()] for i in (chosen, rejected)]
            seen.append(b"|".join(text.numpy().tobytes() for text in texts))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "compute_loss", record)
    assert reward.run(toy.context("reward", reward={"epochs": 1}))["reward/train_pairs"] == 84
    assert len(seen) == len(set(seen)) == 84


def test_a_trainer_that_drops_rows_is_refused(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.Trainer, "_prepare_dataset", lambda self, dataset, *args: dataset.select(range(80)))
    with pytest.raises(TrainingError, match="the trainer kept 80 of 84 training rows"):
        reward.run(toy.context("reward"))


def test_ratings_are_declared_and_need_not_be_there(toy: Any) -> None:
    inputs = STAGES["reward"].inputs
    assert "ratings" in inputs["prepare"]
    assert "ratings" in inputs["judge"]
    context = toy.context("reward")
    judged = "judge" if context.config.judge.enabled else "prepare"
    assert "ratings" in stage_inputs("reward", context.config)[judged]
    assert not context.has("prepare/ratings/train.parquet")
    assert not context.has("judge/ratings/train.parquet")  # the judge is off here


def test_the_first_rows() -> None:
    assert Ratings([[1], [2]], [0.0, 1.0]).first(1) == ([[1]], [0.0])
    assert Pairs([[1], [2]], [[3], [4]], [0.0, 1.0], [0, 1], [True, False]).first(1) == (
        [[1]],
        [[3]],
        [0.0],
        [0],
        [True],
    )
