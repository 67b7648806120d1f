"""Evaluation on held-out prompts: its numbers, and that the best policy within the KL budget is what remains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.errors import ArtifactError, ConfigError, RewardError, TrainingError
from rlhf.ppo import state, validation
from rlhf.ppo.batching import generator
from rlhf.ppo.policy import exact_kl
from rlhf.ppo.rollout import collect
from rlhf.ppo.sequences import unpack
from rlhf.ppo.trainer import Trainer
from rlhf.ppo.validation import Best

MakeTrainer = Callable[..., Trainer]


def evaluations(trainer: Trainer) -> dict[int, dict[str, float]]:
    """What each evaluation found, by update."""
    prefix = "ppo/eval/"
    found = {
        step: {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        for step, values in trainer.tracker.points
    }
    return {step: values for step, values in found.items() if values}


@pytest.mark.parametrize("temperature", [None, 0.0, 1.3])
def test_the_numbers_of_an_evaluation(
    temperature: float | None, make_trainer: MakeTrainer, shifted: Callable[[Trainer], None]
) -> None:
    trainer = make_trainer(eval_every=2, eval_prompts=4, eval_temperature=temperature, judges=["words"])
    trainer.prepare()
    shifted(trainer)
    assert trainer.evaluate(1) == {}
    found = trainer.evaluate(2)
    uniforms = torch.rand(4, 7, generator=generator(3, "evaluate"))
    sampled_at = {None: 0.7, 0.0: 1e-6, 1.3: 1.3}[temperature]
    made = collect(
        trainer.policy, trainer.tokenizer, trainer.held_out.select(range(4)), uniforms, sampled_at, trainer.device
    )
    scores, _ = trainer.rewards(made.prompts.texts, made.responses, made.prompts.columns)
    kl = exact_kl(trainer.policy, trainer.reference, 1.3 if temperature == 1.3 else 0.7, made.sequences)
    words = np.array([len(response.split()) for response in made.responses])
    assert words.std() > 0
    expected = {
        "score": scores.mean().item(),
        "score_stderr": scores.numpy().std(ddof=1) / np.sqrt(4),
        "judge/words": words.mean(),
        "judge/words_stderr": words.std(ddof=1) / np.sqrt(4),
        "overoptimised/words": 0.0,
        "reward/odd": scores.mean().item(),
        "kl": unpack(kl, made.sequences.mask).sum(1).mean().item(),
        "response_length_mean": made.sequences.response_lengths.float().mean().item(),
        "eos_rate": made.ended.float().mean().item(),
    }
    assert found.pop("ppo/seconds/evaluate") > 0.0
    assert found == pytest.approx({f"ppo/eval/{name}": value for name, value in expected.items()}, rel=1e-5)
    assert found["ppo/eval/kl"] > 0.0


def test_evaluations_and_judges_change_nothing_that_is_trained(
    make_trainer: MakeTrainer, tiny: Any, tmp_path: Path
) -> None:
    """Not even judges, and rewards, that draw random numbers from the global generators."""

    def noisy(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [len(response) + torch.rand(1).item() for response in responses]

    results = []
    for number, (every, judges) in enumerate([(0, []), (1, []), (1, ["even", "words"])]):
        place = tmp_path / str(number)
        trainer = make_trainer(eval_every=every, judges=judges, reward=noisy, checkpoints=place)
        trainer.take_best = lambda: None  # type: ignore[method-assign]
        trainer.train()
        results.append((tiny.weights(trainer), trainer.progress.history, trainer.progress.evaluations))
    for weights, history, _ in results[1:]:
        assert history == results[0][1]
        assert all(torch.equal(weight, weights[name]) for name, weight in results[0][0].items())
    judged = [name for name in results[2][2][0] if "judge/" in name or "overoptimised/" in name]
    assert [{k: v for k, v in row.items() if k not in judged} for row in results[2][2]] == results[1][2]


def test_the_policy_before_the_first_update_is_evaluated_too(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(eval_every=3, updates=7, judges=["words"])
    finals = trainer.train()
    rows = trainer.progress.evaluations
    assert [row["update"] for row in rows] == [0, 3, 6, 7]
    assert len(rows) == validation.planned(trainer.settings)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert trainer.tracker.points[0][0] == 0
    assert evaluations(trainer) == {row["update"]: {k: v for k, v in row.items() if k != "update"} for row in rows}
    assert list(rows[0]) == [
        *("update", "score", "score_stderr", "kl", "response_length_mean", "eos_rate", "reward/odd"),
        *("judge/words", "judge/words_stderr", "overoptimised/words"),
    ]
    assert finals["ppo/overoptimised"] == finals["ppo/overoptimised/words"] == rows[-1]["overoptimised/words"]
    without = make_trainer(updates=1, judges=["words"], checkpoints=tmp_path / "without").train()
    assert "ppo/overoptimised" not in without


@pytest.mark.parametrize(
    ("given", "judges", "expected"),
    [
        (None, [], "score"),
        (None, ["words"], "score"),
        (None, ["words", "held_out"], "judge/held_out"),
        ("score", ["held_out"], "score"),
        ("judge/words", ["words", "held_out"], "judge/words"),
    ],
)
def test_the_best_is_the_held_out_judges_where_nothing_else_is_asked_for(
    given: str | None, judges: list[str], expected: str, tiny: Any
) -> None:
    found = validation.best_metric(tiny.settings(eval_every=1, best_metric=given), dict.fromkeys(judges, len))
    assert found == expected


def test_the_best_policy_has_most_of_the_judges_score(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(eval_every=1, judges=["words"], best_metric="judge/words", learning_rate=1e-2)
    finals = trainer.train()
    rows = trainer.progress.evaluations[1:]
    best = max(rows, key=lambda row: row["judge/words"])
    assert (finals["ppo/best_update"], finals["ppo/best_judge/words"]) == (best["update"], best["judge/words"])


def test_a_training_that_made_nothing_better_says_so(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    """And keeps a trained policy all the same."""
    trainer = make_trainer(eval_every=1, updates=2, learning_rate=1e-9)
    trainer.train()
    assert trainer.progress.best is not None
    assert trainer.progress.best.update == 1
    assert "no policy has more of score than the one before training" in caplog.text
    caplog.clear()
    rows, best = trainer.progress.evaluations, Best(1, trainer.progress.evaluations[0]["score"] + 0.1, 0.0)
    validation.warn_if_no_better(rows, "score", best)
    assert not caplog.text


@pytest.mark.parametrize("lora", [0, 2])
def test_the_best_policy_is_what_remains(lora: int, make_trainer: MakeTrainer, tiny: Any) -> None:
    """A reward that turns round: what was best at update 2 is kept though training goes on to update 5."""
    at: dict[int, dict[str, torch.Tensor]] = {}
    trainer = make_trainer(lora=lora, updates=5, eval_every=1, checkpoint_every=2)
    scores = iter([1.5, 0.1, 0.9, 0.5, 0.9, 0.3])  # that before training does not count; a tie goes to the earlier one
    measure = validation.measure

    def staged(*arguments: Any) -> dict[str, torch.Tensor]:
        return measure(*arguments) | {"score": torch.full((6,), next(scores), dtype=torch.float64)}

    step = trainer.step

    def noting(update: int) -> dict[str, float]:
        metrics = step(update)
        at[update] = tiny.weights(trainer)
        return metrics

    trainer.step = noting  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "measure", staged)
        finals = trainer.train()
    assert trainer.progress.best == Best(2, pytest.approx(0.9), evaluations(trainer)[2]["kl"])
    assert (finals["ppo/best_update"], finals["ppo/best_score"]) == (2.0, pytest.approx(0.9))
    for name, weight in tiny.weights(trainer).items():
        assert torch.equal(weight, at[2 if name.startswith("policy") else 5][name]), name
    kept = sorted(path.name for path in (trainer.checkpoints / "best").iterdir())
    assert kept == ["checkpoint-2"]


def test_only_policies_within_the_kl_budget_count(make_trainer: MakeTrainer) -> None:
    free = make_trainer(eval_every=1, learning_rate=3e-2, updates=3)
    free.train()
    kls = {update: values["kl"] for update, values in evaluations(free).items()}
    assert kls[1] < kls[3]
    best = validation.better({"score": 9.0, "kl": 2.0}, 7, free.settings, "score", None)
    assert best == Best(7, 9.0, 2.0)
    assert validation.better({"score": 9.0, "kl": 2.0}, 8, free.settings, "score", best) is None
    assert validation.better({"score": 9.0, "kl": 2.0}, 0, free.settings, "score", None) is None
    tight = make_trainer(eval_every=1, kl_budget=2.0).settings
    assert validation.better({"score": 10.0, "kl": 2.1}, 8, tight, "score", best) is None
    assert validation.better({"score": 10.0, "kl": 2.0}, 8, tight, "score", best) == Best(8, 10.0, 2.0)


def test_without_a_policy_in_the_budget_the_last_one_remains(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(eval_every=1, kl_budget=1e-9, learning_rate=3e-2, updates=2)
    finals = trainer.train()
    assert "no evaluation was within ppo.kl_budget 1e-09: the last policy is kept" in caplog.text
    assert trainer.progress.best is None
    assert "ppo/best_update" not in finals


def test_a_resumed_training_has_the_same_best_policy(make_trainer: MakeTrainer, tiny: Any, tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    def make(folder: str) -> Trainer:
        return make_trainer(eval_every=1, updates=5, checkpoint_every=2, checkpoints=tmp_path / folder)

    straight = make("straight")
    expected = straight.train()
    for stop in (1, 3, 4):
        stopped = make(f"stopped-{stop}")
        record = stopped.record

        def stopping(metrics: dict[str, float], record: Any = record, stop: int = stop, it: Any = stopped) -> None:
            record(metrics)
            if it.progress.update == stop:
                raise StoppedError

        stopped.record = stopping  # type: ignore[method-assign]
        with pytest.raises(StoppedError):
            stopped.train()
        resumed = make(f"stopped-{stop}")
        assert resumed.train() == expected
        assert resumed.progress.best == straight.progress.best
        for name, weight in tiny.weights(straight).items():
            assert torch.equal(weight, tiny.weights(resumed)[name]), name


def test_a_policy_kept_by_a_killed_attempt_does_not_take_the_place_of_the_best(
    make_trainer: MakeTrainer, tiny: Any
) -> None:
    """The attempt kept update 3 and died before its checkpoint; this time, as on a GPU, update 3 is not as good."""
    first = make_trainer(eval_every=1, updates=4, checkpoint_every=2)
    first.prepare()
    for update, better in ((1, 0.5), (2, 0.9)):
        first.step(update)
        first.progress.best = Best(update, better, 0.1)
        state.save_best(first.checkpoints, first.policy, update)
    first.save()
    expected = {name: weight for name, weight in tiny.weights(first).items() if name.startswith("policy")}
    first.step(3)
    state.save_best(first.checkpoints, first.policy, 3)

    again = make_trainer(eval_every=1, updates=4, checkpoint_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "better", lambda *arguments: None)
        again.train()
    assert again.progress.best.update == 2
    assert all(torch.equal(weight, tiny.weights(again)[name]) for name, weight in expected.items())


def test_an_evaluation_that_fails_says_when(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(eval_every=1)
    trainer.prepare()

    def sick(*arguments: Any) -> Any:
        raise RewardError("reward 'odd' returned nan")

    trainer.rewards = sick  # type: ignore[assignment]
    with pytest.raises(RewardError, match="evaluation after update 2: reward 'odd' returned nan"):
        trainer.evaluate(2)
    trainer.rewards, trainer.judges = make_trainer().rewards, {"sick": sick}
    with pytest.raises(RewardError, match="evaluation after update 0: reward 'odd' returned nan"):
        trainer.evaluate(0)
    trainer.judges = {"sick": lambda *arguments: [torch.nan] * 6}
    with pytest.raises(TrainingError, match=r"evaluation after update 2.*judge/sick is not finite"):
        trainer.evaluate(2)
    trainer.judges = {}
    with torch.no_grad():
        trainer.policy.language_model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(TrainingError, match=r"evaluation after update 2.*kl.* is not finite"):
        trainer.evaluate(2)


def test_a_best_policy_that_is_damaged_is_not_used(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(eval_every=1)
    trainer.train()
    best = trainer.checkpoints / "best" / f"checkpoint-{trainer.progress.best.update}" / "policy.safetensors"
    best.write_bytes(best.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"the best policy.*policy\.safetensors has changed"):
        make_trainer(eval_every=1).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_metric": "reward/even"}, "allowed are score, reward/odd"),
        ({"best_metric": "judge/held_out", "judges": ["words"]}, "allowed are score, reward/odd, judge/words"),
        ({"held_out": None}, "1 process.* have 0 held-out prompts"),
    ],
)
def test_evaluations_that_cannot_be_are_refused_before_training(
    changes: dict[str, Any], message: str, make_trainer: MakeTrainer
) -> None:
    own: Sequence[str] = ("held_out",)
    trainer = make_trainer(eval_every=1, **{k: v for k, v in changes.items() if k not in own})
    for name in own:
        if name in changes:
            setattr(trainer, name, changes[name])
    with pytest.raises(ConfigError, match=message):
        trainer.prepare()
