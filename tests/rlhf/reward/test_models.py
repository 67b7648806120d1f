"""Reward models of all architectures: each learns with its own tokenizer, is saved whole, and scores as in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models as tokenizer_models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from rlhf.models import adapt, loading
from rlhf.models.score_input import score_token_ids, usable_length
from rlhf.reward import stage as reward
from rlhf.rewards import RewardModel

CAUSAL, ENCODERS = ("gpt2", "llama"), ("bert", "distilbert", "roberta", "deberta-v2")
ARCHITECTURES = (*CAUSAL, *ENCODERS, "t5")
WORDS = ("no", "ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")
STEPS: dict[str, Any] = {"max_steps": 30, "batch_size": 28, "learning_rate": 3e-3, "checkpoint_every": 10}


def make_tokenizer(architecture: str) -> PreTrainedTokenizerFast:
    """Whole words, and the special tokens that the architecture's own tokenizers add by themselves."""
    pad, start, end = {
        "gpt2": ("<e>", "", "<e>"),  # end-of-sequence pads
        "llama": ("<pad>", "<s>", "</s>"),
        "roberta": ("<pad>", "<s>", "</s>"),
        "t5": ("<pad>", "", "</s>"),
    }.get(architecture, ("[PAD]", "[CLS]", "[SEP]"))
    special = [start, pad, end] if architecture == "roberta" else [pad, start, end]  # whose padding is 1
    special = list(dict.fromkeys(token for token in special if token))
    vocabulary = {word: i for i, word in enumerate((*special, "<unk>", *WORDS))}
    words = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    added = " ".join(part for part in (start, "$A", "" if architecture in CAUSAL else end) if part)
    words.post_processor = processors.TemplateProcessing(
        single=added, special_tokens=[(token, vocabulary[token]) for token in special]
    )
    ends = {"sep_token": end, "cls_token": start} if architecture in ENCODERS else {"eos_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, unk_token="<unk>", **ends)


def make_trunk(architecture: str, directory: Path, positions: int = 48) -> Path:
    """A tiny model without a score head, with random weights, as a pretrained one would be saved."""
    tokenizer = make_tokenizer(architecture)
    size: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    width: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    long: dict[str, Any] = {"max_position_embeddings": positions}
    end = {"eos_token_id": tokenizer.eos_token_id}
    config = {
        "gpt2": lambda: GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=positions, **size, **end),
        "llama": lambda: LlamaConfig(**width, **long, **size, **end),
        "bert": lambda: BertConfig(**width, **long, **size),
        "distilbert": lambda: DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, **long, **size),
        "roberta": lambda: RobertaConfig(**width, **long, **size),
        "deberta-v2": lambda: DebertaV2Config(
            **width, **long, **size, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False
        ),
        "t5": lambda: T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, **size, **end
        ),
    }[architecture]()
    torch.manual_seed(1)
    model = (AutoModelForCausalLM if architecture in CAUSAL else AutoModel).from_config(config)
    loading.save(model, tokenizer, directory / architecture)
    return directory / architecture


def saved_weights(context: Any) -> bytes:
    content: bytes = (context.out / "model/model.safetensors").read_bytes()
    return content


# ------------------------------------------------------------------------------------------------------ how they read
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_text_ends_once(architecture: str, tmp_path: Path) -> None:
    make_tokenizer(architecture).save_pretrained(tmp_path)
    tokenizer = loading.load_tokenizer(tmp_path)
    (row,) = score_token_ids(tokenizer, ["ant bee"])
    end = tokenizer.sep_token_id if architecture in ENCODERS else tokenizer.eos_token_id
    words = tokenizer.convert_tokens_to_ids(["ant", "bee"])
    start = [] if architecture in ("gpt2", "t5") else [tokenizer.convert_tokens_to_ids("[CLS]")]
    start = [tokenizer.convert_tokens_to_ids("<s>")] if architecture in ("llama", "roberta") else start
    assert row == [*start, *words, end]
    assert score_token_ids(tokenizer, [f"ant bee {tokenizer.eos_token}", ""]) == [row, [*start, end]]
    assert score_token_ids(tokenizer, []) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_longest_text_is_read_and_a_longer_one_is_refused(architecture: str, tmp_path: Path) -> None:
    """RoBERTa's first position is that of the padding token + 1: of 20 positions, 18 serve."""
    model = loading.reward_from_policy(make_trunk(architecture, tmp_path, positions=20)).eval()
    limit = usable_length(model)
    assert limit == {"roberta": 18, "t5": None}.get(architecture, 20)
    ids = torch.full((1, limit or 100), 5)
    ids[0, -1] = model.config.eos_token_id or 2
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_a_classifier_with_other_labels_lends_its_trunk(tmp_path: Path) -> None:
    trunk = make_trunk("distilbert", tmp_path)
    sentiment = AutoModelForSequenceClassification.from_pretrained(trunk, num_labels=2)
    loading.save(sentiment, make_tokenizer("distilbert"), tmp_path / "sentiment")
    model = loading.reward_from_policy(tmp_path / "sentiment")
    assert model.classifier.out_features == model.config.num_labels == 1
    assert torch.equal(model.pre_classifier.weight, sentiment.pre_classifier.weight)


# ------------------------------------------------------------------------------------------------------ how they learn
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_learns_and_scores_as_it_was_trained(
    toy: Any, tmp_path: Path, architecture: str, capfd: pytest.CaptureFixture[str]
) -> None:
    context = toy.context("reward", reward=STEPS | {"path": str(make_trunk(architecture, tmp_path))})
    finals = reward.run(context)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    losses = [values["reward/validation_loss"] for _, values in toy.curves() if "reward/validation_loss" in values]
    assert losses[-1] < 0.8 * losses[0]
    assert finals["reward/test_accuracy_low"] > 0.5
    assert finals["reward/test_accuracy"] > 0.9

    model = loading.load_reward_model(context.out / "model")
    scorer = RewardModel(model, loading.load_tokenizer(context.out / "model"))
    columns = pq.read_table(toy.shared / "prepare/preferences/test.parquet").to_pydict()
    rows = pq.read_table(context.out / "scores.parquet", filters=[("split", "==", "test")]).to_pydict()
    for side in ("chosen", "rejected"):
        assert scorer(columns["prompt"], columns[side], {}) == pytest.approx(rows[f"{side}_score"], abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_trains_adapters_and_the_new_head_and_saves_both(toy: Any, tmp_path: Path, architecture: str) -> None:
    trunk = make_trunk(architecture, tmp_path)
    section = STEPS | {"path": str(trunk), "learning_rate": 1e-2}
    context = toy.context("reward", reward=section, model={"lora_rank": 4})
    finals = reward.run(context)
    assert finals["reward/test_accuracy"] > 0.9
    torch.manual_seed(3)
    before, after = loading.reward_from_policy(trunk), loading.load_reward_model(context.out / "model")
    assert before.state_dict().keys() == after.state_dict().keys()
    changed = {
        name for name, weight in after.state_dict().items() if not torch.equal(weight, before.state_dict()[name])
    }
    assert [name for name in changed if name.startswith(("score", "classifier", "classification_head"))]
    assert [name for name in changed if "attention" in name.lower() or "attn" in name]
    assert not [name for name in changed if "embed" in name or "wte" in name or "norm" in name.lower()]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_an_encoder_resumes_bit_identically(toy: Any, tmp_path: Path, lora_rank: int) -> None:
    path = str(make_trunk("distilbert", tmp_path))
    options: dict[str, Any] = {
        "reward": {"max_steps": 5, "batch_size": 42, "path": path},
        "model": {"lora_rank": lora_rank},
    }
    whole = toy.context("reward", run="whole", **options)
    finals = reward.run(whole)
    with pytest.raises(KeyboardInterrupt):
        reward.run(toy.context("reward", tracker=toy.killer("run", 3), **options))
    again = toy.context("reward", **options)
    assert reward.run(again) == finals
    assert saved_weights(again) == saved_weights(whole)
    assert toy.curves() == toy.curves("whole")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lora", [0, 2])
def test_a_score_has_more_digits_than_bf16_under_autocast_too(architecture: str, lora: int, tmp_path: Path) -> None:
    model = loading.reward_from_policy(make_trunk(architecture, tmp_path))
    if lora:
        model = adapt.add_lora(model, lora, 8.0)
    ids = torch.randint(3, len(WORDS), (8, 12), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = model.config.eos_token_id if architecture == "t5" else ids[:, -1]  # it is read there
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            assert (scores[:1] @ scores[:1].T).dtype == torch.bfloat16  # autocast goes on after the head
        assert scores.dtype == torch.float32
        assert not torch.equal(scores, scores.bfloat16().float())
