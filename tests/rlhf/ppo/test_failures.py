"""What is not finite stops the run: the batch is saved, the last good checkpoint kept. Large is only clipped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.errors import ConfigError, RewardError, TrainingError
from rlhf.ppo import core
from rlhf.ppo.trainer import Trainer
from rlhf.rewards import Rewards
from rlhf.store import checkpoints

ARCHITECTURES = ["gpt2", "llama", "falcon", "gpt_bigcode", "t5"]
KINDS = list(itertools.product(ARCHITECTURES, [0, 2]))
MakeTrainer = Callable[..., Trainer]


def saved_batch(trainer: Trainer, update: int, error: Exception) -> dict[str, Any]:
    """The batch that a failure named; the checkpoint of the update before is there."""
    path = trainer.checkpoints / f"failed-update-{update}-process-0.pt"
    assert str(path) in str(error)
    good = checkpoints.latest(trainer.checkpoints)
    assert (checkpoints.step_of(good) if good else 0) == update - 1
    batch: dict[str, Any] = torch.load(path, weights_only=True)
    return batch


@pytest.mark.parametrize(("architecture", "lora"), KINDS)
def test_nan_in_the_rewards(architecture: str, lora: int, make_trainer: MakeTrainer) -> None:
    trainer, calls = make_trainer(architecture, lora=lora, checkpoint_every=1), 0

    def sick(prompts: Sequence[str], responses: Sequence[str], columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return [math.nan if calls == 3 and i == 5 else 1.0 for i in range(len(responses))]

    trainer.rewards = Rewards({"sick": (1.0, sick)})
    with pytest.raises(TrainingError, match=r"update 3: a score is not finite.*update 2, is kept") as caught:
        trainer.train()
    batch = saved_batch(trainer, 3, caught.value)
    assert torch.isnan(batch["scored"]["scores"]).tolist() == [i == 5 for i in range(8)]
    assert len(batch["rollout"]["responses"]) == len(batch["rollout"]["prompts"]["texts"]) == 8


@pytest.mark.parametrize(
    ("value", "hidden_by"), [(math.nan, {"missing_eos": "replace"}), (math.inf, {"score_clip": 1.0})], ids=str
)
def test_a_score_is_looked_at_before_anything_hides_it(
    value: float, hidden_by: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(max_new_tokens=1, **hidden_by)  # hardly a response ends
    trainer.rewards = Rewards({"sick": (1.0, lambda prompts, responses, columns: [value] * len(responses))})
    with pytest.raises(TrainingError, match="update 1: a score is not finite") as caught:
        trainer.train()
    scored = saved_batch(trainer, 1, caught.value)["scored"]
    assert torch.isfinite(scored["scores"]).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_reward_function_that_fails_is_named_and_its_batch_is_saved(
    value: float | None, make_trainer: MakeTrainer
) -> None:
    def sick(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        if value is None:
            return [1.0 / len(prompt) if "rain" not in prompt else 1 / 0 for prompt in prompts]
        return [value if "rain" in prompt else 1.0 for prompt in prompts]

    message = "raised ZeroDivisionError" if value is None else f"returned {value}"
    trainer = make_trainer(reward=sick)
    with pytest.raises(RewardError, match=rf"ppo update 1: reward 'odd' {message}.*row \d: prompt 'rain'") as caught:
        trainer.train()
    assert "rain" in saved_batch(trainer, 1, caught.value)["rollout"]["prompts"]["texts"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("architecture", "lora"), KINDS)
def test_logits_that_are_not_finite(architecture: str, lora: int, value: float, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(architecture, lora=lora, checkpoint_every=1, updates=2)
    trainer.train()
    broken = make_trainer(architecture, lora=lora, checkpoint_every=1, updates=3)
    rollout = broken.rollout

    def sick(update: int) -> Any:
        with torch.no_grad():
            broken.policy.language_model.get_output_embeddings().weight[7] = value
        return rollout(update)

    broken.rollout = sick  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"update 3: a log-probability is not finite.*update 2, is kept") as caught:
        broken.train()
    batch = saved_batch(broken, 3, caught.value)
    assert not torch.isfinite(batch["rollout"]["logprobs"]).all()


@pytest.mark.parametrize(("architecture", "lora"), KINDS)
@pytest.mark.parametrize("group", [0, 1])  # the policy's gradients, the value model's
def test_gradients_that_are_not_finite(
    architecture: str, lora: int, group: int, make_trainer: MakeTrainer, tiny: Any
) -> None:
    trainer = make_trainer(architecture, lora=lora)
    trainer.prepare()
    before = tiny.weights(trainer)
    trainer.learner.trainable[group][-1].register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingError, match="a loss or gradient is not finite") as caught:
        trainer.step(1)
    assert saved_batch(trainer, 1, caught.value)["rows"].tolist() != []
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.weights(trainer).items())


@pytest.mark.parametrize("part", ["policy_loss", "value_loss"])
@pytest.mark.parametrize("value", ["separate", "shared"])
def test_a_loss_that_is_not_finite_changes_no_weight(
    part: str, value: str, make_trainer: MakeTrainer, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(value_model=value)
    trainer.prepare()
    before = tiny.weights(trainer)
    original = getattr(core, part)
    monkeypatch.setattr(core, part, lambda *a: original(*a)._replace(loss=original(*a).loss * math.nan))
    with pytest.raises(TrainingError, match="a loss or gradient is not finite") as caught:
        trainer.step(1)
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.weights(trainer).items())
    assert saved_batch(trainer, 1, caught.value)["rows"].tolist() != []


@pytest.mark.parametrize(("architecture", "lora"), KINDS)
def test_a_large_gradient_is_clipped_and_counted(
    architecture: str, lora: int, make_trainer: MakeTrainer, experience: Any
) -> None:
    trainer = make_trainer(architecture, lora=lora, max_grad_norm=1e-3, epochs=2)
    trainer.prepare()
    metrics = trainer.step(1)
    assert metrics["ppo/grad_norm"] > 1e-3  # as it was before clipping
    assert metrics["ppo/grad_clip_fraction"] == 1.0
    batch = experience(trainer)
    trainer.learner.backward(batch, torch.arange(8))
    norm = torch.stack([p.grad.norm() for p in trainer.learner.parameters if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_episodes_must_divide_into_the_minibatches(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    object.__setattr__(trainer.settings, "minibatches", 3)
    with pytest.raises(ConfigError, match=r"ppo\.episodes 8 must be a multiple"):
        trainer.prepare()


def test_a_failure_leaves_an_earlier_failed_batch_of_another_update_alone(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer()
    first = trainer.keep_batch(1, rows=torch.arange(2))
    assert trainer.keep_batch(2, rows=torch.arange(3)) != first
    assert torch.load(first, weights_only=True)["rows"].tolist() == [0, 1]
