"""Half precision for frozen weights: what is kept in it, what is not, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlhf.config.pipeline import PipelineConfig
from rlhf.models import adapt, loading
from rlhf.models.dtypes import Dtype
from rlhf.sft import stage as sft
from rlhf.stages import STAGES

LORA = {"lora_rank": 2, "dtype": "bfloat16"}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def base(toy: Any) -> Path:
    path: Path = toy.shared / "prepare/base"
    return path


@pytest.fixture
def reward(base: Path, tmp_path: Path) -> Path:
    loading.save(loading.reward_from_policy(base), loading.load_tokenizer(base), tmp_path / "reward")
    return tmp_path / "reward"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_models_are_loaded_in_a_type_and_the_score_is_float32(base: Path, reward: Path, dtype: Dtype) -> None:
    expected = getattr(torch, dtype)
    assert {p.dtype for p in loading.load_policy(base, dtype=dtype).parameters()} == {expected}
    for model in (
        loading.load_reward_model(reward, dtype=dtype),
        loading.value_model_from(base, reward, dtype=dtype),
        loading.value_model_from(base, dtype=dtype),
    ):
        assert {p.dtype for p in model.base_model.parameters()} == {expected}
        assert loading.score_head(model).weight.dtype == torch.float32
    found = loading.load_reward_model(reward, dtype=dtype)(IDS).logits  # by the model's own forward pass
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loading.load_reward_model(reward)(IDS).logits, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("load", [loading.load_policy, loading.reward_from_policy])
def test_adapters_are_float32_and_merge_without_rounding(base: Path, load: Any) -> None:
    adapted = adapt.add_lora(load(base, dtype="bfloat16"), 2, 8.0)
    learning = [p for p in adapted.parameters() if p.requires_grad]
    assert {p.dtype for p in learning} == {torch.float32}
    before = {n: p.clone() for n, p in adapted.named_parameters() if n.endswith("base_layer.weight")}
    with torch.no_grad():
        for parameter in learning:
            parameter.add_(1e-3)  # of which bf16 would keep next to nothing
    products = {n: m.get_delta_weight("default") for n, m in adapted.named_modules() if hasattr(m, "get_delta_weight")}
    merged = dict(adapt.merge_lora(adapted).named_parameters())
    assert {p.dtype for p in merged.values()} == {torch.float32}
    assert before
    for name, weight in before.items():
        place = name.removesuffix(".base_layer.weight")
        found = merged[place.removeprefix("base_model.model.") + ".weight"]
        torch.testing.assert_close(found, weight.float() + products[place], rtol=0.0, atol=1e-8)


def test_sft_with_a_base_in_bf16_learns_and_resumes_bit_identically(toy: Any) -> None:
    section = {"sft": {"max_steps": 6}}
    whole = toy.context("sft", run="whole", model=LORA, **section)
    finals = sft.run(whole)
    plain = sft.run(toy.context("sft", run="plain", model={"lora_rank": 2}, **section))
    assert finals["sft/validation_loss"] == pytest.approx(plain["sft/validation_loss"], rel=0.02)
    assert finals["sft/validation_loss"] != plain["sft/validation_loss"]
    with pytest.raises(KeyboardInterrupt):
        sft.run(toy.context("sft", model=LORA, tracker=toy.killer("run", 5), **section))
    again = toy.context("sft", model=LORA, **section)
    assert sft.run(again) == finals
    saved = [(c.out / "model/model.safetensors").read_bytes() for c in (whole, again)]
    assert saved[0] == saved[1]
    assert {p.dtype for p in loading.load_policy(again.out / "model").parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("model", "resources", "message"),
    [
        ({"dtype": "bfloat16"}, {}, "sft trains all of them"),
        ({"dtype": "float16", "lora_rank": 2}, {"precision": "bf16"}, "has no loss scaling"),
    ],
)
def test_what_cannot_learn_is_refused(toy: Any, model: Any, resources: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        toy.context("sft", model=model, resources=resources)


def test_without_any_training_every_type_will_do(toy: Any) -> None:
    off = dict.fromkeys(("sft", "judge", "reward", "ppo"), False)
    model = {"init": "pretrained", "path": "x", "dtype": "float16"}
    config = PipelineConfig.model_validate({"data": {"prompts": "x.jsonl"}, "model": model, **off})
    assert config.model.dtype == "float16"
    toy.context("sft", run="scaled", model={"dtype": "float16", "lora_rank": 2}, resources={"precision": "fp16"})


def test_the_type_is_in_the_key_of_the_stages_that_read_it() -> None:
    keyed = {name for name, stage in STAGES.items() if "model.dtype" in stage.settings}
    assert keyed == {"sft", "judge", "reward", "ppo", "evaluate"}
