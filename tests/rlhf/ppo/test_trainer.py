"""The loop: its modes, its metrics and its failures."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch

from rlhf.ppo import core
from rlhf.ppo.trainer import Trainer
from rlhf.rewards import Rewards

ARCHITECTURES = ["gpt2", "llama"]
MakeTrainer = Callable[..., Trainer]


# ---------------------------------------------------------------------------------------------------------------- modes
@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 1), (2, 4)])
def test_epochs_times_minibatches_optimizer_steps(epochs: int, minibatches: int, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(epochs=epochs, minibatches=minibatches)
    trainer.prepare()
    trainer.step(1)
    states = trainer.learner.optimizer.state_dict()["state"].values()
    assert {int(state["step"]) for state in states} == {epochs * minibatches}


def test_minibatches_of_an_epoch_hold_every_episode_once(
    make_trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, seen = make_trainer(epochs=2, minibatches=4), []
    trainer.prepare()
    backward = trainer.learner.backward
    monkeypatch.setattr(
        trainer.learner, "backward", lambda e, rows, **o: (seen.append(rows.tolist()), backward(e, rows, **o))[1]
    )
    trainer.step(1)
    epochs = [list(chain(*seen[:4])), list(chain(*seen[4:]))]
    assert all(sorted(rows) == list(range(8)) for rows in epochs)
    assert epochs[0] != epochs[1]


def test_early_stop_takes_no_step_beyond_its_limit(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(epochs=5, learning_rate=3e-2, early_stop_kl=1e-3, updates=1, schedule="constant")
    trainer.prepare()
    metrics = trainer.step(1)
    steps = {int(state["step"]) for state in trainer.learner.optimizer.state_dict()["state"].values()}
    assert steps == {1}  # the second minibatch was already too far away
    assert metrics["ppo/approx_kl"] > 1.5e-3 / 2  # the mean of the two that were looked at
    assert all(p.grad is None for p in trainer.learner.parameters)
    calm = make_trainer(epochs=5, learning_rate=1e-6, early_stop_kl=1e-3)
    calm.prepare()
    calm.step(1)
    assert {int(state["step"]) for state in calm.learner.optimizer.state_dict()["state"].values()} == {5}


def test_warm_up_trains_the_value_model_only(make_trainer: MakeTrainer, tiny: Any) -> None:
    trainer = make_trainer(warmup_updates=1, weight_decay=0.1)
    trainer.prepare()
    before = tiny.weights(trainer)
    metrics = trainer.step(1)
    after = tiny.weights(trainer)
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == name.startswith("policy"), name
    assert (metrics["ppo/ratio_mean"], metrics["ppo/approx_kl"], metrics["ppo/policy_loss"]) == (1.0, 0.0, 0.0)
    trainer.step(2)
    assert any(not torch.equal(w, before[n]) for n, w in tiny.weights(trainer).items() if n.startswith("policy"))


def test_learning_rates(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(learning_rate=1e-3, value_learning_rate=4e-3, updates=4)
    trainer.prepare()
    rates = []
    for update in (1, 2, 3, 4):
        metrics = trainer.step(update)
        groups = [group["lr"] for group in trainer.learner.optimizer.param_groups]
        assert metrics["ppo/learning_rate"] == groups[0]
        rates.append(groups)
    assert [rate for pair in rates for rate in pair] == pytest.approx(
        [1e-3, 4e-3, 0.75e-3, 3e-3, 0.5e-3, 2e-3, 0.25e-3, 1e-3]
    )
    constant = make_trainer(schedule="constant")
    constant.prepare()
    assert constant.step(3)["ppo/learning_rate"] == 1e-3
    assert constant.learner.optimizer.param_groups[1]["lr"] == 1e-3  # the value model's default is the policy's


def test_adaptive_kl(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(kl_control="adaptive", kl_coef=0.1, kl_target=0.5, kl_horizon=100.0, updates=3)
    trainer.train()
    coefficients = [values["ppo/kl_coef"] for _, values in trainer.tracker.points]
    kls = [values["ppo/kl"] for _, values in trainer.tracker.points]
    expected = 0.1
    for coefficient, kl in zip(coefficients, kls, strict=True):
        assert coefficient == pytest.approx(expected)
        expected = core.next_kl_coef(expected, kl, 0.5, 8, 100.0)
    assert trainer.progress.kl_coef == pytest.approx(expected)
    assert coefficients[1] == pytest.approx(0.1 * (1 - 0.2 * 0.08))  # the first KL is 0


def test_the_learning_rate_follows_the_approx_kl(make_trainer: MakeTrainer) -> None:
    """Of the policy alone; it is what the update before made of it."""
    trainer = make_trainer(
        lr_target_kl=0.02, learning_rate=1e-4, value_learning_rate=2e-3, epochs=4, updates=6, schedule="constant"
    )
    trainer.prepare()
    scale, seen = 1.0, set()
    for update in range(1, 7):
        metrics = trainer.step(update)
        assert [group["lr"] for group in trainer.learner.optimizer.param_groups] == pytest.approx([1e-4 * scale, 2e-3])
        seen.add(metrics["ppo/approx_kl"] > 0.04)
        scale = core.next_lr_scale(scale, metrics["ppo/approx_kl"], 0.02)
        assert trainer.progress.lr_scale == pytest.approx(scale)
    assert scale > 1.0


def test_scores_are_divided_by_their_running_standard_deviation(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(scale_scores=True, score_clip=1.5)
    trainer.prepare()
    every: list[torch.Tensor] = []
    for update in (1, 2, 3):
        rollout = trainer.rollout(update)
        scored = trainer.score(rollout, update)
        every.append(scored.raw_scores)
        expected = (scored.raw_scores / torch.cat(every).std(correction=0)).clamp(-1.5, 1.5)
        torch.testing.assert_close(scored.scores, expected)
        assert (scored.raw_scores / torch.cat(every).std(correction=0)).max() > 1.5  # the clip comes second


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_estimator": "k2"},
        {"kl_estimator": "k3"},
        {"whiten_rewards": True},
        {"score_clip": 0.2},
        {"missing_eos": "replace"},
        {"missing_eos": "penalty"},
    ],
    ids=str,
)
def test_each_mode_changes_the_rewards_as_it_says(changes: dict[str, Any], make_trainer: MakeTrainer) -> None:
    """The whole path from settings to returns, against the same formulas written out."""
    trainer = make_trainer(**changes, kl_coef=0.3)
    trainer.prepare()
    with torch.no_grad():
        for parameter in trainer.learner.trainable[0]:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    rollout = trainer.rollout(1)
    scored = trainer.score(rollout, 1)
    found = trainer.advantages(rollout, scored)

    s, mask = trainer.settings, rollout.sequences.mask
    d = torch.where(mask, rollout.logprobs - scored.ref_logprobs, 0.0)
    kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[s.kl_estimator]
    scores = scored.raw_scores if s.score_clip is None else scored.raw_scores.clamp(-0.2, 0.2)
    if s.missing_eos != "off":
        other = torch.full_like(scores, -1.0) if s.missing_eos == "replace" else scores - 1.0
        scores = torch.where(rollout.ended, scores, other)
    expected = -0.3 * kl
    expected[torch.arange(8), rollout.sequences.response_lengths - 1] += scores
    torch.testing.assert_close(found.rewards, expected)
    if s.whiten_rewards:
        real = expected[mask]
        expected = (expected - real.mean()) / (real.var(correction=0) + 1e-8).sqrt() + real.mean()
        expected = torch.where(mask, expected, 0.0)
    advantages, returns = core.generalized_advantages(expected, scored.values, mask, 1.0, 0.95)
    torch.testing.assert_close(found.advantages, advantages)
    torch.testing.assert_close(found.returns, returns)


def test_advantages_are_whitened_over_the_rollout_unless_told_not_to(
    make_trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
    experience: Any,
) -> None:
    for whiten in (True, False):
        trainer = make_trainer(whiten_advantages=whiten, minibatches=2)
        trainer.prepare()
        seen: list[Any] = []
        backward = trainer.learner.backward
        monkeypatch.setattr(
            trainer.learner, "backward", lambda e, r, f=backward, s=seen, **o: (s.append(e), f(e, r, **o))[1]
        )
        raw = experience(trainer)
        trainer.optimise(raw, 1)
        found = core.moments(seen[0].advantages, raw.sequences.mask)
        assert (found.mean.item() == pytest.approx(0.0, abs=1e-6)) == whiten
        assert (found.variance.item() == pytest.approx(1.0, rel=1e-4)) == whiten
        assert torch.equal(seen[0].returns, raw.returns)


def test_rewards_are_weighted_and_each_is_a_metric(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    one = lambda prompts, responses, columns: [float(i) for i in columns["id"]]  # noqa: E731
    two = lambda prompts, responses, columns: [10.0] * len(responses)  # noqa: E731
    trainer.rewards = Rewards({"one": (2.0, one), "two": (-0.5, two)})
    trainer.prepare()
    metrics = trainer.step(1)
    assert metrics["ppo/reward/two"] == 10.0
    assert metrics["ppo/score_mean"] == pytest.approx(2.0 * metrics["ppo/reward/one"] - 5.0)


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "falcon", "gpt_bigcode", "t5"])
def test_gradient_checkpointing_trains_alike(
    architecture: str, lora: int, make_trainer: MakeTrainer, tiny: Any
) -> None:
    results = []
    for on in (False, True):
        trainer = make_trainer(architecture, lora=lora)
        if on:
            for model in (trainer.policy.model, trainer.value_model.model):
                model.activation_checkpointing_enable({"use_reentrant": False})
                assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        trainer.prepare()
        trainer.step(1)
        results.append(tiny.weights(trainer))
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- metrics
def test_every_update_has_every_metric(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    finals = trainer.train()
    names = """
        reward_mean reward_std score_mean score_std reward/odd kl kl_stderr kl_coef sampling_gap entropy
        policy_loss value_loss approx_kl clip_fraction value_clip_fraction ratio_mean ratio_max explained_variance
        advantage_mean advantage_std grad_norm grad_clip_fraction learning_rate response_length_mean eos_rate
        tokens_per_second seconds/rollout seconds/score seconds/optimise peak_memory_bytes
    """
    assert [step for step, _ in trainer.tracker.points] == [1, 2, 3, 4]
    for _, values in trainer.tracker.points:
        assert values.keys() == {f"ppo/{name}" for name in names.split()}
        assert all(math.isfinite(value) for value in values.values())
    assert trainer.tracker.live[-1].keys() == {"done", "total", "reward", "kl", "tokens_per_s"}
    last = trainer.tracker.points[-1][1]
    assert finals["ppo/final_reward_mean"] == last["ppo/reward_mean"]
    assert finals["ppo/final_kl"] == last["ppo/kl"]
    assert finals["ppo/episodes"] == 32
    assert not finals.keys() & last.keys()


def test_metrics_by_hand(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, kept = make_trainer(kl_coef=0.3, kl_estimator="k3", missing_eos="replace"), {}
    for name in ("rollout", "score"):
        method = getattr(trainer, name)
        monkeypatch.setattr(trainer, name, lambda *a, m=method, n=name: kept.setdefault(n, m(*a)))
    trainer.prepare()
    trainer.step(1)
    kept.clear()
    metrics = trainer.step(2)
    rollout, scored = kept["rollout"], kept["score"]
    d = torch.where(rollout.sequences.mask, rollout.logprobs - scored.ref_logprobs, 0.0)
    k3 = (-d).exp() - 1 + d
    rewards = scored.scores - 0.3 * k3.sum(1)
    expected = {
        "kl": d.sum(1).mean(),  # per sequence, always k1
        "kl_stderr": d.sum(1).std(correction=0) / 8**0.5,
        "reward_mean": rewards.mean(),
        "reward_std": rewards.std(correction=0),
        "score_mean": scored.scores.mean(),
        "score_std": scored.scores.std(correction=0),
        "entropy": rollout.entropies[rollout.sequences.mask].mean(),
        "response_length_mean": rollout.sequences.mask.sum(1).float().mean(),
        "eos_rate": rollout.ended.float().mean(),
        "reward/odd": scored.components["odd"].mean(),
    }
    for name, value in expected.items():
        assert metrics[f"ppo/{name}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    assert metrics["ppo/seconds/rollout"] > 0


def test_samples_are_kept_every_so_often(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(updates=5, log_samples_every=2)
    trainer.train()
    samples = trainer.progress.samples
    assert sorted({sample.update for sample in samples}) == [2, 4, 5]
    assert {sample.prompt for sample in samples} <= set(trainer.prompts.texts)
    assert "<|end|>" not in "".join(sample.response for sample in samples)
