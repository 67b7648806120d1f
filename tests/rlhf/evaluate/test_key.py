"""Judges of the evaluation in the configuration and in the cache key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.cache import plan
from rlhf.cache.plan import Planner
from rlhf.config import yaml_files as settings
from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import ConfigError
from rlhf.store.artifacts import Store

JUDGE = "def editor(prompts, firsts, seconds, **columns):\n    return [{} for _ in prompts]\n"


def config(**evaluate: Any) -> PipelineConfig:
    sections: dict[str, Any] = {"data": {"demonstrations": "d.jsonl"}, "model": {"init": "random"}}
    off = {"judge": "off", "reward": "off", "ppo": {"rewards": {"brevity": 1}}}
    return PipelineConfig.model_validate({**sections, **off, "evaluate": evaluate})


def ingredients(home: Path, of: PipelineConfig, stage: str = "evaluate") -> dict[str, Any]:
    return Planner(of, Store(home)).ingredients(stage, {})


def test_the_code_of_a_judge_is_in_the_key_of_evaluate_alone(tmp_path: Path) -> None:
    file = tmp_path / "judges.py"
    judged = config(judges={"mine": f"{file}:editor"})
    found = []
    for answer in ("1.0", "-1.0"):
        file.write_text(JUDGE.format(answer))
        found.append(ingredients(tmp_path, judged))
    assert plan.differences(*found) == [f"function {file}:editor: judges.py changed"]
    assert ingredients(tmp_path, judged, "ppo") == ingredients(tmp_path, config(), "ppo")


def test_what_ppo_is_trained_on_is_in_the_key_of_evaluate(tmp_path: Path) -> None:
    """It is measured there, too, and the report says which scores it makes worthless."""
    found = ingredients(tmp_path, config())
    assert found["config.ppo.rewards.brevity.function"] == "brevity"
    assert "function brevity: rlhf/rewards/builtin.py" in found
    assert not any(name.startswith("config.ppo.") and "rewards" not in name for name in found)


def test_a_judge_that_is_not_there_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "judges.py").write_text(JUDGE.format(1))
    with pytest.raises(ConfigError, match="has no 'editr'"):
        ingredients(tmp_path, config(judges={"mine": f"{tmp_path}/judges.py:editr"}))


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"judges": {"mine": "brevity"}}, "judges.mine is 'brevity'; must be a function of yours"),
        ({"judges": {"held_out": "a:b"}}, "judges: 'held_out' is the name of a score, too"),
        ({"judges": {"x": "a:b"}, "scorers": {"x": "brevity"}}, "judges: 'x' is the name of a score, too"),
        ({"scorers": {"held_out": "brevity"}}, "'held_out' is a metric that every evaluation has"),
        ({"scorers": {"reward_x": "brevity"}}, "'reward_x' begins with `reward_`"),
    ],
)
def test_names_that_would_be_taken_for_others(evaluate: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**evaluate)


def test_a_judge_in_a_file_beside_the_configuration_and_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data: {demonstrations: d.jsonl, preferences: p.jsonl}\nmodel: {init: random}\n"
        "evaluate: {judges: {editor: judges.py:editor}}\n"
    )
    loaded = settings.load(path, overrides=["evaluate.judges.other=pkg.module:f"])
    assert loaded.evaluate.judges == {"editor": f"{tmp_path}/judges.py:editor", "other": "pkg.module:f"}
    without = settings.load(path, overrides=["evaluate.judges.editor="])
    assert without.evaluate.judges == {}
