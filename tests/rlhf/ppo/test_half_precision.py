"""fp16 with loss scaling: an overflow moves nothing and halves the scale, and the scale is part of the state.

accelerate offers fp16 on GPUs only. Its two parts, autocast and the gradient scaler, work on a CPU too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from rlhf.errors import TrainingError
from rlhf.ppo.generation import GREEDY
from rlhf.ppo.rollout import collect
from rlhf.ppo.trainer import Trainer
from rlhf.rewards import RewardModel

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def half() -> Iterator[Callable[[float], Accelerator]]:
    """Makes the accelerator of an fp16 training, with the loss scale that it starts from."""
    AcceleratorState._reset_state(reset_partial_state=True)

    def make(scale: float) -> Accelerator:
        accelerator = Accelerator(cpu=True)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        return accelerator

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared(trainer: Trainer, accelerator: Accelerator) -> Trainer:
    trainer.accelerator = accelerator
    trainer.prepare()
    return trainer


@pytest.mark.parametrize(("architecture", "lora", "value"), [("gpt2", 0, "separate"), ("llama", 2, "shared")])
def test_the_scale_is_not_in_the_gradients(
    architecture: str,
    lora: int,
    value: str,
    make_trainer: MakeTrainer,
    half: Callable[[float], Accelerator],
    experience: Any,
    tiny: Any,
) -> None:
    found = []
    for scale in (1.0, 1024.0):
        trainer = prepared(make_trainer(architecture, lora=lora, value_model=value, max_grad_norm=1e9), half(scale))
        step = trainer.learner.backward(experience(trainer), torch.arange(8))
        found.append((tiny.gradients(trainer), step.grad_norm))
    assert ((found[0][0] - found[1][0]).norm() / found[0][0].norm()).item() < 0.02  # fp16 has 11 bits
    assert found[0][1] == pytest.approx(found[1][1], rel=0.02)
    single = make_trainer(architecture, lora=lora, value_model=value, max_grad_norm=1e9)
    AcceleratorState._reset_state(reset_partial_state=True)
    prepared(single, Accelerator(cpu=True))
    exact = single.learner.backward(experience(single), torch.arange(8)).grad_norm
    assert found[0][1] == pytest.approx(exact, rel=0.1)


def test_the_first_step_starts_at_ratio_one(make_trainer: MakeTrainer, half: Callable[[float], Accelerator]) -> None:
    trainer = prepared(make_trainer(epochs=1), half(1024.0))
    metrics = trainer.step(1)
    assert abs(metrics["ppo/ratio_max"] - 1.0) < 1e-5
    assert (metrics["ppo/loss_scale"], metrics["ppo/overflows"]) == (1024.0, 0.0)


def test_an_overflow_moves_nothing_and_halves_the_scale(
    make_trainer: MakeTrainer, half: Callable[[float], Accelerator], tiny: Any
) -> None:
    trainer = prepared(make_trainer(epochs=1), half(2.0**60))
    before = tiny.weights(trainer)
    metrics = trainer.step(1)
    assert (metrics["ppo/overflows"], metrics["ppo/grad_clip_fraction"]) == (1.0, 0.0)
    assert metrics["ppo/loss_scale"] == 2.0**59
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.weights(trainer).items())
    while metrics["ppo/overflows"]:
        metrics = trainer.step(1)
    assert any(not torch.equal(weight, before[name]) for name, weight in tiny.weights(trainer).items())


def test_a_gradient_that_no_scale_saves_stops_the_run(
    make_trainer: MakeTrainer, half: Callable[[float], Accelerator]
) -> None:
    trainer = prepared(make_trainer(epochs=1), half(4.0))
    trainer.learner.trainable[0][0].register_hook(lambda gradient: gradient * torch.nan)
    for _ in range(2):  # 4 -> 2 -> 1
        assert trainer.step(1)["ppo/overflows"] == 1.0
    with pytest.raises(TrainingError, match="a loss or gradient is not finite"):
        trainer.step(1)


def test_the_scale_is_resumed(make_trainer: MakeTrainer, half: Callable[[float], Accelerator], tmp_path: Path) -> None:
    trainer = prepared(make_trainer(), half(2.0**60))
    trainer.step(1)
    trainer.save()
    assert trainer.accelerator.scaler.get_scale() < 2.0**60
    resumed = prepared(make_trainer(), half(2.0**60))
    resumed.restore()
    assert resumed.accelerator.scaler.get_scale() == trainer.accelerator.scaler.get_scale()


def test_an_early_stop_leaves_nothing_behind(make_trainer: MakeTrainer, half: Callable[[float], Accelerator]) -> None:
    trainer = prepared(make_trainer(epochs=5, learning_rate=3e-2, early_stop_kl=1e-3), half(1024.0))
    trainer.step(1)
    metrics = trainer.step(2)
    assert metrics["ppo/overflows"] == 0.0
    assert {int(state["step"]) for state in trainer.learner.optimizer.state_dict()["state"].values()} == {2}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_greedy_decoding_does_not_overflow(
    architecture: str, make_trainer: MakeTrainer, half: Callable[[float], Accelerator]
) -> None:
    trainer = prepared(make_trainer(architecture, eval_every=1, eval_temperature=0.0), half(1024.0))
    with trainer.accelerator.autocast():
        made = collect(
            trainer.policy, trainer.tokenizer, trainer.held_out, torch.rand(6, 7), GREEDY, trainer.device, "dynamic"
        )
    assert torch.isfinite(made.logprobs[made.sequences.mask]).all()
    assert trainer.evaluate(1)["ppo/eval/kl"] == pytest.approx(0.0, abs=1e-3)


def test_scores_and_values_are_read_in_float32(
    make_trainer: MakeTrainer, half: Callable[[float], Accelerator], tiny: Any
) -> None:
    trainer = prepared(make_trainer(), half(1024.0))
    model = RewardModel(tiny.value_model("llama").requires_grad_(False), tiny.tokenizer())
    with trainer.accelerator.autocast():
        scores = torch.tensor(model(list(tiny.words), ["yes"] * len(tiny.words), {}))
    values = trainer.score(trainer.rollout(1), 1).values
    for numbers in (scores, values[values != 0.0]):
        assert not torch.equal(numbers, numbers.half().float())
