"""Stopped after any update and resumed in a new trainer, a training ends with the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from rlhf import errors
from rlhf.errors import ArtifactError
from rlhf.ppo.state import Progress
from rlhf.ppo.trainer import Trainer
from tests import quick_python

MakeTrainer = Callable[..., Trainer]
SCRIPT = Path(__file__).with_name("killed.py")
TIMED = ("ppo/seconds", "ppo/tokens_per_second", "ppo/peak_memory_bytes")


def whimsical(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A reward with random numbers of its own, from NumPy's and torch's global generators.

    Not from Python's: in a test process, threads of Prefect's connections may draw from that one at any time.
    """
    return [len(r) * 0.1 + np.random.rand() + torch.rand(1).item() for r in responses]


def curves(trainer: Trainer) -> list[tuple[int, dict[str, float]]]:
    """What was logged, without what depends on the clock."""
    return [(s, {k: v for k, v in values.items() if not k.startswith(TIMED)}) for s, values in trainer.tracker.points]


class StoppedError(Exception):
    """Stands for a kill."""


EVERYTHING: dict[str, Any] = {  # every piece of state that a training has
    "minibatches": 2,
    "kl_control": "adaptive",
    "kl_horizon": 50.0,
    "whiten_rewards": True,
    "scale_scores": True,
    "lr_target_kl": 0.02,
    "eval_every": 1,
    "judges": ["even", "words"],
}


class Straight(NamedTuple):
    """What a training that nobody stopped has left."""

    finals: dict[str, float]
    curves: list[tuple[int, dict[str, float]]]
    progress: Progress
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained_straight(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Straight]:
    """A function that trains with ``EVERYTHING`` and these changes without a stop, once for all who ask for it."""

    @cache
    def train(**changes: Any) -> Straight:
        trainer = tiny.trainer(tmp_path_factory.mktemp("straight"), **changes, **EVERYTHING)
        return Straight(trainer.train(), curves(trainer), trainer.progress, tiny.weights(trainer))

    return train


def assert_ends_alike(resumed: Trainer, straight: Straight, tiny: Any) -> None:
    """Trained to its end, it has the same final metrics and the same bits in its weights."""
    assert resumed.train() == straight.finals
    weights = tiny.weights(resumed)
    for name, weight in straight.weights.items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize(("stop", "value"), [(1, "separate"), (3, "shared"), (4, "separate")])
@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "falcon", "gpt_bigcode", "t5"])
def test_a_resumed_training_ends_with_the_same_bits(
    stop: int,
    value: str,
    lora: int,
    architecture: str,
    make_trainer: MakeTrainer,
    trained_straight: Callable[..., Straight],
    tiny: Any,
) -> None:
    """Checkpoints are at updates 2 and 4 of 5: the stop is before the first, between the two, and at the second."""

    changes = {"architecture": architecture, "lora": lora, "reward": whimsical, "value_model": value}
    straight = trained_straight(updates=5, **changes)
    make = partial(make_trainer, updates=5, **changes, **EVERYTHING)
    stopped = make()
    record = stopped.record

    def stopping(metrics: dict[str, float]) -> None:
        record(metrics)
        if stopped.progress.update == stop and stop % 2:
            raise StoppedError

    def killed_while_saving() -> None:
        original_save()
        if stopped.progress.update == stop:
            raise StoppedError

    original_save = stopped.save
    stopped.record, stopped.save = stopping, killed_while_saving  # type: ignore[method-assign]
    with pytest.raises(StoppedError):
        stopped.train()

    np.random.rand(), torch.rand(7)  # the world has gone on
    resumed = make()
    # A journal that outlives the kill; a stage without a checkpoint starts with an empty one.
    resumed.tracker.points = list(stopped.tracker.points) if stop > 1 else []
    assert_ends_alike(resumed, straight, tiny)
    assert curves(resumed) == straight.curves
    assert resumed.progress.samples == straight.progress.samples
    assert resumed.progress.evaluations == straight.progress.evaluations
    assert resumed.progress.peaks == straight.progress.peaks


@pytest.mark.parametrize("asked", [1, 2, 5])
def test_a_training_that_is_asked_to_end_leaves_a_checkpoint(
    asked: int, make_trainer: MakeTrainer, trained_straight: Callable[..., Straight], tiny: Any
) -> None:
    """Before the first regular one, at the second, and in the last update, where there is nothing left to be saved."""
    straight = trained_straight(updates=5)
    stopped = make_trainer(updates=5, **EVERYTHING)
    optimise, saved = stopped.optimise, []

    def asking(experience: Any, update: int) -> Any:
        stopped.stop.asked = update == asked
        return optimise(experience, update)

    original_save = stopped.save
    stopped.optimise = asking  # type: ignore[method-assign]
    stopped.save = lambda: (saved.append(stopped.progress.update), original_save())  # type: ignore[method-assign]
    if asked == 5:
        assert stopped.train() == straight.finals
        return
    with pytest.raises(errors.StoppedError, match=f"after update {asked} of 5"):
        stopped.train()
    assert saved == [asked]  # and not twice
    resumed = make_trainer(updates=5, **EVERYTHING)
    resumed.tracker.points = list(stopped.tracker.points)
    assert_ends_alike(resumed, straight, tiny)
    assert curves(resumed) == straight.curves


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "architecture", "lora"), [("rollout", "gpt2", 2), ("epoch", "t5", 0), ("checkpoint", "llama", 0)]
)
def test_a_training_killed_with_signal_9_ends_with_the_same_bits(
    where: str,
    architecture: str,
    lora: int,
    make_trainer: MakeTrainer,
    trained_straight: Callable[..., Straight],
    tiny: Any,
    tmp_path: Path,
) -> None:
    changes: dict[str, Any] = {"architecture": architecture, "lora": lora, "updates": 6}
    folder = tmp_path / "checkpoints"
    arguments = [quick_python.executable(), SCRIPT, where, folder, json.dumps(changes | EVERYTHING)]
    killed = subprocess.run(arguments, capture_output=True, text=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (".writing-6" in {path.name for path in folder.iterdir()}) == (where == "checkpoint")
    straight, resumed = trained_straight(**changes), make_trainer(**changes, **EVERYTHING)
    assert_ends_alike(resumed, straight, tiny)
    assert curves(resumed)[0][0] == (5 if where == "checkpoint" else 3)  # from the checkpoint before
    assert curves(resumed) == [point for point in straight.curves if point[0] >= curves(resumed)[0][0]]


def test_a_finished_training_is_not_trained_again(make_trainer: MakeTrainer, tiny: Any) -> None:
    first = make_trainer()
    expected = first.train()
    again = make_trainer()
    assert again.train() == expected
    assert again.tracker.points == []  # its own recorder: no update ran
    for name, weight in tiny.weights(first).items():
        assert torch.equal(weight, tiny.weights(again)[name])


def test_a_damaged_checkpoint_is_passed_over(
    make_trainer: MakeTrainer, tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer()
    expected = trainer.train()
    damaged = tmp_path / "checkpoints" / "checkpoint-4" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    again = make_trainer()
    assert again.train() == expected
    assert [step for step, _ in again.tracker.points] == [3, 4]
    assert "optimizer.safetensors has changed" in caplog.text


def test_a_checkpoint_of_another_model_is_refused(make_trainer: MakeTrainer) -> None:
    make_trainer(updates=1).train()
    with pytest.raises(ArtifactError, match="is of another model"):
        make_trainer("llama", updates=1).train()


def test_the_same_seed_gives_the_same_training(make_trainer: MakeTrainer, tiny: Any, tmp_path: Path) -> None:
    results = []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        trainer = make_trainer(checkpoints=tmp_path / folder, updates=2)
        trainer.seed = seed
        trainer.train()
        results.append((curves(trainer), tiny.weights(trainer)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(w, results[1][1][n]) for n, w in results[0][1].items())
    assert results[0][0] != results[2][0]
