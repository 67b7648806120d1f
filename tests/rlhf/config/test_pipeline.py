"""The schema: documented, frozen, closed, and clear about what does not go together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf.config import yaml_files as settings
from rlhf.config.fields import Section
from rlhf.config.pipeline import PipelineConfig

GOOD: dict[str, Any] = {
    "data": {"demonstrations": "a.jsonl", "preferences": "b.jsonl"},
    "model": {"init": "random"},
}


def sections(model: type[Section] = PipelineConfig) -> Iterator[type[Section]]:
    yield model
    for info in model.model_fields.values():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from sections(info.annotation)


def merged(**changes: Any) -> dict[str, Any]:
    """The good configuration with the sections of ``changes`` laid over it; ``None`` takes a key out."""
    made = {name: dict(values) for name, values in GOOD.items()}
    for name, values in changes.items():
        if isinstance(values, dict):
            made[name] = {key: value for key, value in {**made.get(name, {}), **values}.items() if value is not None}
        else:
            made[name] = values
    return made


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.__name__)
def test_every_field_has_a_description(section: type[Section]) -> None:
    assert section.__doc__
    for name, info in section.model_fields.items():
        is_section = isinstance(info.annotation, type) and issubclass(info.annotation, Section)
        assert is_section or (info.description or "").endswith((".", ")")), f"{section.__name__}.{name}"


def test_json_round_trip() -> None:
    config = PipelineConfig.model_validate(
        merged(
            ppo={"rewards": {"model": 0.5, "a:b": 2, "keywords": {"arguments": {"words": ["a"]}}}},
            judge={"annotators": ["x"]},
        )
    )
    assert PipelineConfig.model_validate_json(config.model_dump_json()) == config
    assert hash(config.model) == hash(PipelineConfig.model_validate_json(config.model_dump_json()).model)


def test_the_json_schema_takes_plain_entries() -> None:
    shown = PipelineConfig.model_json_schema()["$defs"]
    for section, field, plain in (("Ppo", "rewards", "number"), ("Evaluate", "scorers", "string")):
        entry = shown[section]["properties"][field]["additionalProperties"]["anyOf"]
        assert plain in [kind.get("type") for kind in entry]


@pytest.mark.parametrize(
    "section", ["data", "model", "sft", "judge", "reward", "ppo", "evaluate", "resources", "tracking"]
)
def test_frozen_and_closed(section: str) -> None:
    config = PipelineConfig.model_validate(merged())
    part = getattr(config, section)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(part, next(iter(type(part).model_fields)), None)
    with pytest.raises(ValidationError, match="Extra inputs"):
        PipelineConfig.model_validate(merged(**{section: {"no_such_key": 1}}))


def test_one_file_needs_no_list() -> None:
    data = PipelineConfig.model_validate(merged(data={"prompts": ["c.jsonl", "d.jsonl"]})).data
    assert data.demonstrations == ("a.jsonl",)
    assert data.prompts == ("c.jsonl", "d.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"demonstrations": None}}, "sft needs data.demonstrations"),
        (
            {"data": {"demonstrations": None, "preferences": None}, "sft": "off", "judge": "off", "reward": "off"},
            "data names no file",
        ),
        ({"reward": False}, "the reward stage is off"),
        ({"data": {"preferences": None}, "judge": "off"}, "reward needs data.preferences"),
        (
            {"data": {"preferences": None}, "reward": "off", "ppo": {"rewards": {"a:b": 1}}},
            "judge needs data.preferences",
        ),
        ({"data": {"demonstrations": None}, "sft": "off"}, "need prompts"),
        ({"ppo": {"max_new_tokens": 256}}, "ppo.max_new_tokens 256 leaves no room"),
        ({"evaluate": {"max_new_tokens": 999}}, "evaluate.max_new_tokens 999 leaves no room"),
        ({"data": {"validation_fraction": 0.5, "test_fraction": 0.5}}, "nothing to train on"),
        ({"model": {"init": "pretrained"}}, "path must name"),
        ({"model": {"path": "gpt2"}}, "must not be set"),
        ({"model": {"width": 100, "heads": 3}}, "multiple of heads"),
        ({"sft": {"micro_batch_size": 5}}, "must divide batch_size"),
        ({"reward": {"batch_size": 4, "micro_batch_size": 8}}, "must divide batch_size"),
        ({"ppo": {"minibatches": 3}}, "must divide episodes"),
        ({"ppo": {"rewards": {}}}, "rewards is empty"),
        ({"ppo": {"eval_every": 9, "best_metric": "reward/modl"}}, "allowed are score, reward/model"),
        ({"ppo": {"judges": {"held_out": "brevity"}}}, "`held_out` is the held-out reward model's name"),
        (
            {"ppo": {"eval_every": 9, "best_metric": "judge/held_out"}, "reward": {"held_out": False}},
            "no held-out reward model is trained",
        ),
        ({"ppo": {"rewards": {"brief": 1}}}, "'brief' is no built-in reward"),
        ({"ppo": {"rewards": {"quality": {"function": "model"}}}, "reward": False}, "the reward stage is off"),
        ({"name": "../up"}, "match pattern"),
        ({"seed": -1}, "greater than or equal"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PipelineConfig.model_validate(merged(**changes))


@pytest.mark.parametrize("word", [False, "off"])
def test_stages_can_be_off(word: Any) -> None:
    config = PipelineConfig.model_validate(merged(sft=word, judge=word, evaluate=word))
    assert (config.sft.enabled, config.judge.enabled, config.evaluate.enabled) == (False, False, False)
    assert config.reward.enabled


def test_presets_load_at_every_size() -> None:
    presets = settings.presets()
    assert "demo" in presets
    for preset in presets.values():
        assert preset.description
        assert preset.needs
        for size in (None, *preset.sizes):
            config = settings.load(preset.name, size=size)
            assert PipelineConfig.model_validate_json(config.model_dump_json()) == config
