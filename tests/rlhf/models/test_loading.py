"""Models and tokenizers: what is made, what is loaded, what is refused, and what LoRA leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models as tokenizer_models, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf.errors import ModelError
from rlhf.models import adapt, loading
from rlhf.ppo.checks import check_policy
from rlhf.ppo.policy import Policy
from rlhf.prepare.random_weights import random_model
from rlhf.sft.stage import response_loss

CAUSAL = ["gpt2", "gpt_bigcode", "llama", "falcon"]
ARCHITECTURES = [*CAUSAL, "t5"]


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<e>", "<p>", "<b>", "a", "b", "Ġ"])}
    bpe = Tokenizer(tokenizer_models.BPE(vocabulary, []))
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **({"eos_token": "<e>", "pad_token": "<p>"} | special))


def make_model(architecture: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **size: int) -> Any:
    torch.manual_seed(seed)
    shape: Any = {"architecture": architecture, "layers": 2, "width": 16, "heads": 2, "context": 32} | size
    return random_model(SimpleNamespace(**shape), tokenizer)


@pytest.fixture(params=["gpt2", "llama"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A policy's directory."""
    tokenizer = make_tokenizer()
    loading.save(make_model(request.param, tokenizer), tokenizer, tmp_path / "policy")
    return tmp_path / "policy"


# ----------------------------------------------------------------------------------------------------------- made
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_random_model_has_the_size_and_tokens_that_were_asked_for(architecture: str) -> None:
    tokenizer = make_tokenizer()
    model = make_model(architecture, tokenizer)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 16, 2)
    assert config.vocab_size == len(tokenizer)
    if architecture == "t5":
        assert (config.num_decoder_layers, config.decoder_start_token_id) == (2, tokenizer.pad_token_id)
    else:
        assert config.max_position_embeddings == 32
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (0, 1, None)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(module.p == 0.0 for module in model.modules() if isinstance(module, torch.nn.Dropout))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_weights_come_from_the_callers_seed(architecture: str) -> None:
    tokenizer = make_tokenizer()
    one, same, other = (make_model(architecture, tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


# --------------------------------------------------------------------------------------------------------- loaded
def test_a_policy_loads_back_bit_for_bit(saved: Path) -> None:
    model = loading.load_policy(saved)
    expected = make_model(model.config.model_type, make_tokenizer()).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    names = {path.name for path in saved.iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_half_precision_weights_are_loaded_as_float32(saved: Path, tmp_path: Path) -> None:
    loading.save(loading.load_policy(saved).half(), make_tokenizer(), tmp_path / "half")
    assert {p.dtype for p in loading.load_policy(tmp_path / "half").parameters()} == {torch.float32}


def test_a_new_reward_model_is_the_policys_trunk_with_a_random_head(saved: Path) -> None:
    torch.manual_seed(0)
    model, policy = loading.reward_from_policy(saved), loading.load_policy(saved)
    trunk = policy.base_model.state_dict()
    assert all(torch.equal(weight, trunk[name]) for name, weight in model.base_model.state_dict().items())
    assert model.config.num_labels == 1
    heads = torch.cat([loading.score_head(loading.reward_from_policy(saved)).weight for _ in range(20)])
    assert heads.std().item() == pytest.approx(17**-0.5, rel=0.15)
    assert heads.mean().item() == pytest.approx(0.0, abs=0.05)


def test_a_value_model_starts_from_the_reward_model_where_it_reads_the_same_tokens(saved: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    reward = loading.reward_from_policy(saved)
    reward.config.score_mean = 0.75
    loading.save(reward, tokenizer, tmp_path / "reward")
    value = loading.value_model_from(saved, tmp_path / "reward")
    assert all(torch.equal(w, value.state_dict()[n]) for n, w in reward.state_dict().items())
    assert value.config.score_mean == 0.75

    other = "llama" if reward.config.model_type == "gpt2" else "gpt2"
    shorter = {"shorter": make_model(reward.config.model_type, tokenizer, context=16)}
    for name, model in ({"other": make_model(other, tokenizer)} | shorter).items():
        loading.save(model, tokenizer, tmp_path / name)
        loading.save(loading.reward_from_policy(tmp_path / name), tokenizer, tmp_path / f"{name}-reward")
        value = loading.value_model_from(saved, tmp_path / f"{name}-reward")
        assert value.config.model_type == reward.config.model_type
        assert value.config.max_position_embeddings == 32
        assert not loading.score_head(value).weight.any()


def test_another_vocabulary_makes_a_reward_model_no_value_model(saved: Path, tmp_path: Path) -> None:
    vocabulary = {token: i for i, token in enumerate(["<e>", "<p>", "<b>", "b", "a", "Ġ"])}  # a and b swapped
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(tokenizer_models.BPE(vocabulary, [])), eos_token="<e>", pad_token="<p>"
    )
    loading.save(loading.reward_from_policy(saved), tokenizer, tmp_path / "reward")
    assert not loading.score_head(loading.value_model_from(saved, tmp_path / "reward")).weight.any()


# -------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("load", [loading.load_policy, loading.load_tokenizer, loading.load_reward_model])
def test_a_model_that_is_not_there_is_named_with_where_it_was_looked_for(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        load("someone/some-model")
    message = str(caught.value)
    for part in ("'someone/some-model'", str(tmp_path / "someone/some-model"), "HF_HUB_OFFLINE", "model.path"):
        assert part in message
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=f"looked in the local directory {tmp_path / 'empty'}"):
        load(tmp_path / "empty")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ppo_and_sft_know_every_architecture(architecture: str) -> None:
    model = make_model(architecture, make_tokenizer()).eval()
    check_policy(Policy(model))
    ids = torch.tensor([[3, 4, 5, 3]])
    labels = torch.tensor([[5, 3, -100, -100] if architecture == "t5" else [-100, -100, 5, 3]])
    total, count = response_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    assert count == 2
    assert total.item() == pytest.approx(2 * model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)


def test_a_decoder_without_a_start_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="no decoder_start_token_id"):
        loading.load_policy(tmp_path / "t5")


def test_an_encoder_decoder_is_a_policy(tmp_path: Path) -> None:
    shape = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)).save_pretrained(tmp_path / "t5")
    assert loading.is_encoder_decoder(tmp_path / "t5")
    assert isinstance(loading.load_policy(tmp_path / "t5"), T5ForConditionalGeneration)


def test_dropouts_that_a_configuration_names_are_off_and_come_back() -> None:
    """Falcon reads ``hidden_dropout`` from its configuration at every step."""
    shape = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = FalconForCausalLM(FalconConfig(**shape, hidden_dropout=0.5, attention_dropout=0.5)).train()
    adapt.set_dropout_zero(model)
    ids = torch.arange(8)[None]
    with adapt.configured_dropout_off(torch.nn.ModuleList([model])):
        assert torch.equal(model(ids).logits, model(ids).logits)
    assert model.config.hidden_dropout == 0.5
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_a_fused_gelu_is_the_same_function() -> None:
    config = GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, activation_function="gelu_new")
    model = GPT2LMHeadModel(config).eval()
    expected = model(torch.arange(8)[None]).logits
    adapt.fuse_gelu(model)
    assert isinstance(model.transformer.h[0].mlp.act, torch.nn.GELU)
    torch.testing.assert_close(model(torch.arange(8)[None]).logits, expected, rtol=1e-5, atol=1e-6)


def test_an_encoder_reads_whole_prompts() -> None:
    tokenizer = make_tokenizer()
    eos = tokenizer.eos_token
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    plain = loading.prompt_token_ids(tokenizer, ["ab"])[0]
    assert loading.prompt_token_ids(tokenizer, ["ab"], encoder=True) == [[*plain, tokenizer.eos_token_id]]


def test_weights_that_are_not_there_are_not_made_up(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"num_labels": 1}))
    with pytest.raises(ModelError, match=r"has no weights for score\.weight"):
        loading.load_reward_model(saved)  # a language model with no score head


def test_a_classifier_with_two_outputs_is_no_reward_model(saved: Path) -> None:
    with pytest.raises(ModelError, match="has 2 outputs"):
        loading.load_reward_model(saved)


def test_an_encoder_has_no_score_for_single_tokens() -> None:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    encoder = BertForSequenceClassification(BertConfig(vocab_size=8, num_labels=1, **shape))
    with pytest.raises(ModelError, match="bert classifier has no `score` layer"):
        loading.score_head(encoder)


# ----------------------------------------------------------------------------------------------------- tokenizers
def test_missing_special_tokens_are_filled_in_without_new_rows(tmp_path: Path) -> None:
    for name, special, eos, pad in (
        ("both", {}, "<e>", "<p>"),
        ("no pad", {"pad_token": None}, "<e>", "<e>"),
        ("encoder", {"eos_token": None, "pad_token": "<p>", "sep_token": "<b>"}, "<b>", "<p>"),
    ):
        make_tokenizer(**special).save_pretrained(tmp_path / name)
        tokenizer = loading.load_tokenizer(tmp_path / name)
        assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == (eos, pad, 6)
    make_tokenizer(eos_token=None).save_pretrained(tmp_path / "none")
    with pytest.raises(ModelError, match="has no end-of-sequence token"):
        loading.load_tokenizer(tmp_path / "none")


def test_prompts_get_a_beginning_only_where_the_tokenizer_adds_it() -> None:
    plain = make_tokenizer(bos_token="<b>")
    assert loading.prompt_token_ids(plain, ["ab", "b"]) == [[3, 4], [4]]
    assert loading.prompt_token_ids(plain, []) == []
    adding = make_tokenizer(bos_token="<b>")
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<b> $A <e>", special_tokens=[("<b>", 2), ("<e>", 0)]
    )
    assert adding("ab")["input_ids"] == [2, 3, 4, 0]
    assert loading.prompt_token_ids(adding, ["ab", "b"]) == [[2, 3, 4], [2, 4]]  # and no end


# ----------------------------------------------------------------------------------------------- LoRA and dropout
def test_lora_starts_as_the_base_freezes_it_and_merges_into_it(saved: Path) -> None:
    base, adapted = loading.load_policy(saved), adapt.add_lora(loading.load_policy(saved), 2, 8.0)
    ids = torch.tensor([[3, 4, 5, 3]])
    assert torch.equal(adapted(input_ids=ids).logits, base(input_ids=ids).logits)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = adapted(input_ids=ids).logits
    merged = adapt.merge_lora(adapted)
    assert merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected)
    assert not torch.allclose(expected, base(input_ids=ids).logits)


def test_a_classifiers_head_learns_beside_its_adapters(saved: Path) -> None:
    adapted = adapt.add_lora(loading.reward_from_policy(saved), 2, 8.0)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert [name for name in trained if "score" in name]
    assert all("lora_" in name or "score" in name for name in trained)
    assert isinstance(loading.score_head(adapt.merge_lora(adapted)), torch.nn.Linear)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_bigcode", "llama"])
def test_dropout_is_off_in_training_mode_and_stays_in_the_config(architecture: str) -> None:
    model = make_model(architecture, make_tokenizer())
    settings = model.config.to_dict().items()
    names = [name for name, value in settings if "drop" in name and isinstance(value, float)]
    assert names
    for name in names:
        setattr(model.config, name, 0.5)
    model = type(model)(model.config).train()  # with dropout, the functional one of attention too
    ids = torch.tensor([[3, 4, 5, 3]])
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    adapt.set_dropout_zero(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert all(getattr(model.config, name) == 0.5 for name in names)
