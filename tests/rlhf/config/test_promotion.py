"""Which scores may decide about a promotion: never one that PPO is trained on."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.config.pipeline import PipelineConfig
from rlhf.config.promotion import trained_on
from rlhf.config.yaml_files import load, presets
from rlhf.errors import ConfigError

SCORERS = {
    "brief": "brevity",
    "ants": {"function": "keywords", "arguments": {"words": ["ant"]}},
    "bees": {"function": "keywords", "arguments": {"words": ["bee"]}},
    "mine": "rewards.py:mine",
}


def made(judge: str = "held_out", **sections: Any) -> PipelineConfig:
    base = {
        "data": {"demonstrations": "d.jsonl", "preferences": "p.jsonl"},
        "model": {"path": "gpt2"},
        "ppo": {"rewards": {"model": 1.0, "keywords": {"weight": 1, "arguments": {"words": ["ant"]}}, "brevity": 0.1}},
        "evaluate": {"scorers": SCORERS},
        "promotion": {"judge": judge},
    }
    return PipelineConfig.model_validate({**base, **sections})


def trained(config: PipelineConfig) -> list[str]:
    return trained_on(config.evaluate, config.ppo)


def test_a_scorer_is_a_reward_if_function_and_arguments_are_the_same() -> None:
    assert trained(made()) == ["brief", "ants"]
    assert trained(made(ppo={"rewards": {"rewards.py:mine": 1.0}})) == ["mine"]
    # By name or not, and with an argument that is the default anyway: it is the same reward.
    similar = {"function": "similarity", "arguments": {"column": "reference"}}
    rewards = {"near": {"weight": 1.0, "function": "similarity"}}
    assert trained(made(ppo={"rewards": rewards}, evaluate={"scorers": {"s": similar}})) == ["s"]
    assert trained(made(ppo="off")) == []


@pytest.mark.parametrize("judge", ["held_out", "bees", "mine"])
def test_what_ppo_does_not_see_may_judge(judge: str) -> None:
    assert made(judge).promotion.judge == judge


@pytest.mark.parametrize("judge", ["brief", "ants"])
def test_without_ppo_all_scores_may_judge(judge: str) -> None:
    assert made(judge, ppo="off").promotion.judge == judge


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        ("brief", "promotion.judge is 'brief', which PPO is trained on (ppo.rewards), so that it proves nothing"),
        ("ants", "which PPO is trained on"),
        ("model", "which PPO is trained on"),
        ("reward", "which PPO is trained on"),
        ("brevity", "which PPO is trained on"),
        ("wasps", "promotion.judge is 'wasps', and there is no such score"),
    ],
)
def test_what_ppo_is_trained_on_is_refused(judge: str, says: str) -> None:
    with pytest.raises(ValueError, match="it may be one of: bees, mine, held_out; add others") as raised:
        made(judge)
    assert says in str(raised.value)


def test_held_out_is_offered_only_where_it_is_trained() -> None:
    with pytest.raises(ValueError, match="it may be one of: bees, mine; add"):
        made("wasps", reward={"held_out": False})
    with pytest.raises(ConfigError, match="it may be one of: none yet; add others"):
        load("custom-reward-distilgpt2", overrides=["promotion.judge=polite"])


@pytest.mark.parametrize("name", presets())
def test_no_preset_is_judged_by_what_it_trains_on(name: str) -> None:
    config = load(name)
    assert config.promotion.judge not in trained(config)
