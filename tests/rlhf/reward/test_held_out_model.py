"""The held-out reward model: another seed, else the same training; what is told of it; stopping in either training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest

from rlhf.errors import StoppedError
from rlhf.models import loading
from rlhf.reward import held_out_model, stage as reward
from rlhf.reward.accuracy import Scores
from rlhf.rewards import RewardModel
from rlhf.store import checkpoints, disk

BOTH: dict[str, Any] = {"held_out": True, "max_steps": 5, "batch_size": 42}
STEPS = 5


class Whole(NamedTuple):
    """A training of both that nothing interrupts: its context, its figures, what it logged, what it told of a step."""

    context: Any
    finals: dict[str, float]
    curves: list[tuple[int, dict[str, float]]]
    told: list[tuple[int, int]]


@pytest.fixture(scope="module")
def whole(shared_toy: Any) -> Whole:
    context, told = shared_toy.context("reward", run="whole", reward=BOTH), list[tuple[int, int]]()
    context.tracker.progress = lambda done, total, **live: told.append((done, total))
    finals = reward.run(context)
    return Whole(context, finals, shared_toy.curves("whole"), told)


def weights(context: Any, part: str) -> bytes:
    content: bytes = (context.out / part / "model.safetensors").read_bytes()
    return content


def scores(context: Any, part: str, prompts: list[str], responses: list[str]) -> np.ndarray[Any, Any]:
    """What a model that the stage wrote says."""
    scorer = RewardModel(loading.load_reward_model(context.out / part), loading.load_tokenizer(context.out / part))
    return np.array(scorer(prompts, responses, {}))


def pairs_in_order(context: Any, part: str, columns: dict[str, list[str]]) -> np.ndarray[Any, Any]:
    """For each pair, whether a model orders it as its label does."""
    chosen, rejected = (scores(context, part, columns["prompt"], columns[side]) for side in ("chosen", "rejected"))
    order: np.ndarray[Any, Any] = chosen > rejected
    return order


# ----------------------------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_it_is_the_model_of_the_next_seed_and_the_first_is_as_without_it(lora_rank: int, toy: Any) -> None:
    both = toy.context("reward", run="both", reward=BOTH, model={"lora_rank": lora_rank})
    reward.run(both)
    for name, seed in (("model", 3), ("held_out", 4)):
        options = {"reward": BOTH | {"held_out": False}, "model": {"lora_rank": lora_rank}, "seed": seed}
        alone = toy.context("reward", run=f"alone-{seed}", **options)
        reward.run(alone)
        assert not (alone.out / "held_out").exists()
        assert weights(both, name) == weights(alone, "model")
        assert (both.out / name / "config.json").read_text() == (alone.out / "model" / "config.json").read_text()
    assert weights(both, "model") != weights(both, "held_out")
    assert {path.name for path in (both.out / "held_out").iterdir()} == {p.name for p in (both.out / "model").iterdir()}


def test_after_the_last_seed_comes_the_first(toy: Any) -> None:
    contexts = held_out_model.trainings(toy.context("reward", reward=BOTH, seed=2**32 - 1))
    assert [context.config.seed for context in contexts] == [2**32 - 1, 0]


def test_its_figures(toy: Any, whole: Whole) -> None:
    context, finals, *_ = whole
    columns = pq.read_table(toy.shared / "prepare/preferences/test.parquet").to_pydict()
    ours, theirs = (pairs_in_order(context, part, columns) for part in ("model", "held_out"))
    assert finals["reward/test_accuracy"] == pytest.approx(ours.mean())
    assert finals["reward/held_out/test_accuracy"] == pytest.approx(theirs.mean())
    low, high = (finals[f"reward/held_out/test_accuracy_{end}"] for end in ("low", "high"))
    assert low <= theirs.mean() <= high
    assert finals["reward/held_out/agreement"] == pytest.approx((ours == theirs).mean())
    demonstrations = pq.read_table(toy.shared / "prepare/demonstrations/train.parquet").to_pydict()
    references = scores(context, "held_out", demonstrations["prompt"], demonstrations["response"])
    assert references.mean() == pytest.approx(0.0, abs=1e-5)
    means = [
        json.loads((context.out / part / "config.json").read_text())["score_mean"] for part in ("model", "held_out")
    ]
    assert means[0] == finals["reward/score_mean"] != means[1]


def test_agreement_by_hand() -> None:
    one = Scores(np.array([1.0, 0.0, 2.0, 5.0, 1.0]), np.array([0.0, 1.0, 2.0, 1.0, 1.0]))  # > < = > =
    other = Scores(np.array([9.0, 3.0, 0.0, 1.0, 4.0]), np.array([8.0, 2.0, 0.0, 3.0, 5.0]))  # > > = < <
    assert held_out_model.agreement(one, other) == pytest.approx(2 / 5)
    assert held_out_model.finals(Scores(np.zeros(0), np.zeros(0)), Scores(np.zeros(0), np.zeros(0)), 0) == {}


def test_curves_of_both_and_one_progress(whole: Whole) -> None:
    assert whole.told == [(step, 2 * STEPS) for step in range(1, 2 * STEPS + 1)]
    prefix, curves = "reward/held_out/", whole.curves
    theirs = [(step, values) for step, values in curves if any(name.startswith(prefix) for name in values)]
    ours = [point for point in curves if point not in theirs]
    assert [(step, {f"reward/{name.removeprefix(prefix)}" for name in values}) for step, values in theirs] == [
        (step, set(values)) for step, values in ours
    ]
    assert [values[f"{prefix}loss"] for _, values in theirs if f"{prefix}loss" in values] != [
        values["reward/loss"] for _, values in ours if "reward/loss" in values
    ]


# ------------------------------------------------------------------------------------------------- stopping, resuming
@pytest.mark.parametrize("step", [3, 5, 8])
def test_resumes_bit_identically_in_either_training(step: int, toy: Any, whole: Whole) -> None:
    """Checkpoints are at steps 2, 4 and 5 of each: in the first, at its end, after the second's first."""
    with pytest.raises(KeyboardInterrupt):
        reward.run(toy.context("reward", tracker=toy.killer("run", step), reward=BOTH))
    again = toy.context("reward", reward=BOTH)
    assert reward.run(again) == whole.finals
    for part in ("model", "held_out"):
        assert weights(again, part) == weights(whole.context, part)
    assert toy.curves() == whole.curves


def test_killed_after_both_it_trains_neither_again(toy: Any, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(reward, "normalisation", lambda *given: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            reward.run(toy.context("reward", reward=BOTH))
    again, told = toy.context("reward", reward=BOTH), list[int]()
    again.tracker.progress = lambda done, total, **live: told.append(done)
    assert reward.run(again) == whole.finals
    assert told == []
    assert toy.curves() == whole.curves


@pytest.mark.parametrize(("step", "message"), [(3, "after step 3 of 5"), (8, "after step 3 of 5"), (5, "after step 1")])
def test_asked_to_end_it_leaves_a_checkpoint(step: int, message: str, toy: Any, whole: Whole) -> None:
    """In the first training, in the second, and between the two."""
    first = toy.context("reward", tracker=toy.asker(step), reward=BOTH)
    with pytest.raises(StoppedError, match=message):
        reward.run(replace(first, stop=first.tracker.stop))
    place = first.checkpoints if step == 3 else first.checkpoints / "held_out"
    assert checkpoints.latest(place) == place / f"checkpoint-{1 if step == 5 else 3}"
    again = toy.context("reward", reward=BOTH)
    reward.run(again)
    for part in ("model", "held_out"):
        assert weights(again, part) == weights(whole.context, part)


def test_there_must_be_room_for_both(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, int]] = []
    monkeypatch.setattr(disk, "check_room", lambda folder, wanted, what: asked.append((folder, wanted)))
    alone, both = (toy.context("reward", run=str(on), reward=BOTH | {"held_out": on}) for on in (False, True))
    reward.run(alone)
    reward.run(both)
    one = asked[0][1]
    assert asked[1:] == [(both.checkpoints, 2 * one), (both.checkpoints / "held_out", one)]
