"""The contest: the champion answers the candidate's prompts as it would have in the candidate's evaluation."""

from __future__ import annotations

import math
import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rlhf.champions import contest, gate
from rlhf.champions.gate import Figures, Pair
from rlhf.champions.ledger import Contender
from rlhf.config.pipeline import PipelineConfig
from rlhf.context import Context
from rlhf.evaluate import output, stage as evaluate
from rlhf.models import loading
from rlhf.store.artifacts import Store, make_manifest
from rlhf.tracking.tracker import NullTracker
from tests.rlhf.conftest import Toy, demonstrations

REWARDS = """
def short(prompts, responses, **columns):
    return [-float(len(response)) for response in responses]

def other(prompts, responses, **columns):
    return [float(response.count("a")) for response in responses]
"""


class Arena:
    """A store with runs whose policies are the toy's with some noise, each evaluated for real."""

    def __init__(self, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = Store(toy.directory / "home")
        self._toy = toy
        self.file = toy.directory / "mine.py"
        self.file.write_text(REWARDS)
        monkeypatch.setattr(output, "_draw", lambda *args: None)

    def config(self, **sections: Any) -> PipelineConfig:
        scorers = {"short": f"{self.file}:short", "other": f"{self.file}:other"}
        made: dict[str, Any] = {
            "seed": 3,
            "data": {"demonstrations": "x.jsonl", "preferences": "x.jsonl"},
            "model": {"init": "random", "layers": 2, "width": 16, "heads": 2, "context": 48, "vocab_size": 270},
            "resources": {"device": "cpu", "threads": 1},
            "judge": "off",
            "ppo": {"max_new_tokens": 8, "rewards": {"model": 1.0, f"{self.file}:short": 0.1}},
            "evaluate": {"max_new_tokens": 8, "temperature": 1.0, "prompts": 12, "batch_size": 5, "bootstrap": 20},
        }
        made["evaluate"]["scorers"] = scorers
        return PipelineConfig.model_validate({**made, **{k: {**made.get(k, {}), **v} for k, v in sections.items()}})

    def run(self, run_id: str, seed: int, config: PipelineConfig | None = None, alarm: float | None = 0.0) -> Contender:
        """A finished run; ``alarm`` is its final ``ppo/overoptimised``, if there is one."""
        config = config or self.config()
        stages = ["prepare", *(s for s in ("sft", "reward", "ppo") if getattr(config, s).enabled)]
        keys = {stage: f"{stage}{seed if stage == 'ppo' else ''}" for stage in stages}
        for stage in stages:
            if not self.store.path(stage, keys[stage]).exists():
                self._publish(stage, keys[stage], seed, {"ppo/overoptimised": alarm} if stage == "ppo" else {})
        out = self.store.work_directory("evaluate", run_id) / "out"
        out.mkdir(parents=True)
        inputs = {stage: self.store.path(stage, keys[stage]) for stage in stages}
        attempt = Context("evaluate", config, inputs, out, out.parent / "checkpoints", NullTracker())
        metrics = evaluate.run(attempt)
        about = {"stage": "evaluate", "key": run_id, "ingredients": {}, "metrics": metrics}
        self.store.publish(out, make_manifest(out, **about))
        return Contender(run_id, {**keys, "evaluate": run_id})

    def _publish(self, stage: str, key: str, seed: int, metrics: dict[str, float | None]) -> None:
        out = self.store.work_directory(stage, key) / "out"
        out.mkdir(parents=True)
        sft = self._toy.shared / "sft" / "model"
        if stage in ("prepare", "sft"):
            shutil.copytree(self._toy.shared / stage, out, dirs_exist_ok=True)
            if stage == "prepare":
                rows = [{"prompt": row["prompt"], "reference": row["response"], "n": 1} for row in demonstrations()]
                (out / "prompts").mkdir()
                pq.write_table(pa.Table.from_pylist(rows), out / "prompts" / "test.parquet")
        elif stage == "ppo":
            torch.manual_seed(seed)
            model = loading.load_policy(sft)
            with torch.no_grad():
                for weight in model.parameters():
                    weight += 0.1 * torch.randn_like(weight)
            loading.save(model, loading.load_tokenizer(sft), out / "model")
        else:
            for number, part in enumerate(("model", "held_out")):
                torch.manual_seed(number)
                loading.save(loading.reward_from_policy(sft), loading.load_tokenizer(sft), out / part)
        known = {name: value for name, value in metrics.items() if value is not None}
        self.store.publish(out, make_manifest(out, stage=stage, key=key, ingredients={}, metrics=known))

    def samples(self, contender: Contender) -> dict[str, list[Any]]:
        path = self.store.path("evaluate", contender.keys["evaluate"]) / "samples.parquet"
        return dict(pq.read_table(path).to_pydict())


@pytest.fixture
def arena(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Arena:
    return Arena(toy, monkeypatch)


def held(arena: Arena, candidate: Contender, champion: Contender | None, **sections: Any) -> Figures:
    found = contest.hold(arena.config(**sections), arena.store, candidate, champion)
    assert found is not None
    return found


def pair(found: Figures) -> Pair:
    assert isinstance(found.scores, Pair), found.scores
    return found.scores


def test_the_champion_answers_as_in_an_evaluation_of_its_own(arena: Arena) -> None:
    """Both runs have the same prompts and settings: what the champion gets is what its own evaluation says."""
    old, new = arena.run("old", 1), arena.run("new", 2)
    found = held(arena, new, old)
    mine, its = arena.samples(new), arena.samples(old)
    np.testing.assert_array_equal(pair(found).candidate, mine["ppo_held_out"])
    np.testing.assert_allclose(pair(found).champion, its["ppo_held_out"], rtol=0, atol=1e-6)
    assert mine["ppo_held_out"] != its["ppo_held_out"]
    assert found.rouge is not None
    np.testing.assert_allclose(found.rouge.candidate, mine["ppo_rougeL"])
    np.testing.assert_allclose(found.rouge.champion, its["ppo_rougeL"])
    assert found.opponent == "the champion, run old"
    assert found.kl == pytest.approx(np.mean(mine["ppo_kl"]))
    assert found.overoptimised == 0.0


def test_a_function_may_judge(arena: Arena) -> None:
    old, new = arena.run("old", 1), arena.run("new", 2)
    found = held(arena, new, old, promotion={"judge": "other"})
    assert pair(found).champion.tolist() == arena.samples(old)["ppo_other"]


def test_the_first_candidate_has_its_sft_policy_to_beat(arena: Arena) -> None:
    new = arena.run("new", 2, alarm=1.0)
    found, samples = held(arena, new, None), arena.samples(new)
    assert pair(found).champion.tolist() == samples["sft_held_out"]
    assert found.rouge is not None
    np.testing.assert_allclose(found.rouge.champion, samples["sft_rougeL"])
    assert (found.opponent, found.overoptimised) == ("the policy before it, sft", 1.0)


def test_without_sft_it_is_the_base_model(arena: Arena) -> None:
    config = arena.config(sft={"enabled": False})
    new = arena.run("new", 2, config)
    found = contest.hold(config, arena.store, new, None)
    assert found is not None
    assert pair(found).champion.tolist() == arena.samples(new)["base_held_out"]


def test_without_references_there_is_no_rouge(arena: Arena) -> None:
    new = arena.run("new", 2)
    path = arena.store.path("evaluate", "new") / "samples.parquet"
    samples = pq.read_table(path)
    nothing = samples.set_column(1, "reference", [[None] * samples.num_rows])
    pq.write_table(nothing, path)
    republish(arena, "evaluate", "new")
    assert held(arena, new, None).rouge is None


def republish(arena: Arena, stage: str, key: str) -> None:
    """Take the content of an artifact for good."""
    manifest = arena.store.remembered(stage, key)
    assert manifest is not None
    out = arena.store.home / "again"
    shutil.copytree(arena.store.path(stage, key), out)
    (out / "manifest.json").unlink()
    about = {"stage": stage, "key": key, "ingredients": {}, "metrics": manifest.metrics}
    arena.store.publish(out, make_manifest(out, **about))


def test_the_same_policy_is_nothing_to_decide(arena: Arena) -> None:
    old, again = arena.run("old", 1), arena.run("again", 1)
    assert contest.hold(arena.config(), arena.store, again, old) is None


def test_a_run_without_alarm_says_so(arena: Arena) -> None:
    assert math.isnan(held(arena, arena.run("new", 2, alarm=None), None).overoptimised)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda arena: shutil.rmtree(arena.store.path("ppo", "ppo1")), "missing"),
        (lambda arena: (arena.store.path("ppo", "ppo1") / "model" / "config.json").write_text("{"), "corrupt"),
    ],
)
def test_a_champion_that_is_gone_is_a_refusal(arena: Arena, break_it: Any, says: str) -> None:
    old, new = arena.run("old", 1), arena.run("new", 2)
    break_it(arena)
    found = held(arena, new, old)
    assert says in str(found.scores)
    assert found.opponent == "the champion, run old"
    verdict = gate.judged(found, arena.config().promotion)
    assert not verdict.promote
    assert verdict.conditions[0].name == "judge"


def test_a_judge_that_has_not_judged_is_a_refusal(arena: Arena) -> None:
    config = arena.config(reward={"enabled": False}, ppo={"rewards": {f"{arena.file}:short": 1.0}})
    new = arena.run("new", 2, config)
    found = contest.hold(config, arena.store, new, None)
    assert found is not None
    assert "of which the evaluation has no scores; of what PPO is not trained on it has other." in str(found.scores)


@pytest.mark.parametrize(
    ("keys", "says"),
    [({"prepare": "prepare", "evaluate": "e"}, "no trained policy"), ({"sft": "sft"}, "has no evaluation")],
)
def test_a_run_without_what_it_takes_is_a_refusal(arena: Arena, keys: dict[str, str], says: str) -> None:
    found = contest.hold(arena.config(), arena.store, Contender("bare", keys), None)
    assert found is not None
    assert says in str(found.scores)
    assert not gate.judged(found, arena.config().promotion).promote
