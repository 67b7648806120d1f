"""The reward model as a scorer, for each kind of classifier: it reads a text as its training did."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from rlhf.errors import RewardError
from rlhf.models.score_input import score_token_ids, usable_length
from rlhf.reward.stage import raw_scores
from rlhf.rewards import RewardModel

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "p", "one", "two", "three", "a", "bb", "ccc"]
PROMPTS, RESPONSES = ["p one", "p", "p two three one"], [" a bb", " ccc", ""]
SHAPE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
IDS = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1}
CONFIGS = {
    "bert": BertConfig(**SHAPE, **IDS, max_position_embeddings=12),
    "roberta": RobertaConfig(**SHAPE, **IDS, max_position_embeddings=13),
    "deberta-v2": DebertaV2Config(
        **SHAPE, **IDS, max_position_embeddings=12, relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    "distilbert": DistilBertConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=8, max_position_embeddings=12, **IDS),
    "t5": T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0, **IDS),
}


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words that adds special tokens as the template says; $A is the text."""
    made = Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def classifier(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS[name]).eval()
    model.config.score_mean, model.config.score_std = 0.5, 2.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0).add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("template", "ids"),
    [
        ("$A", [4, 5, 2]),  # GPT-2
        ("<bos> $A", [1, 4, 5, 2]),  # Llama
        ("<eos> $A", [2, 4, 5, 2]),  # OPT
        ("<bos> $A <eos>", [1, 4, 5, 2]),  # BERT, RoBERTa, DeBERTa
        ("$A <eos>", [4, 5, 2]),  # T5
    ],
)
def test_each_text_ends_in_one_end_token(template: str, ids: list[int]) -> None:
    assert score_token_ids(tokenizer(template), ["p one", "p one<eos>"]) == [ids, ids]
    assert score_token_ids(tokenizer(template), []) == []


def test_a_separator_ends_a_text_too(tiny_bert: Any) -> None:
    made = tiny_bert.tokenizer
    ids = made("one two")["input_ids"]
    assert ids[-1] == made.sep_token_id
    assert score_token_ids(made, ["one two"]) == [ids]
    made.eos_token = "."  # as a decoder's tokenizer with a separator of its own may have
    assert score_token_ids(made, ["one two"]) == [ids]


@pytest.mark.parametrize("tokens_at_once", [16384, 1])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_scores_are_those_of_the_training(name: str, tokens_at_once: int) -> None:
    """Against each text alone through the model's own forward, and against what the reward stage computes."""
    model, made = classifier(name), tokenizer("$A <eos>" if name == "t5" else "<bos> $A <eos>")
    found = RewardModel(model, made, tokens_at_once)(PROMPTS, RESPONSES, {})
    rows = score_token_ids(made, [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)])
    for row, score in zip(rows, found, strict=True):
        with torch.no_grad():
            logit = model(input_ids=torch.tensor([row])).logits.item()
        assert score == pytest.approx((logit - 0.5) / 2.0, rel=1e-4, abs=1e-5)
    np.testing.assert_allclose((raw_scores(model, rows, 2) - 0.5) / 2.0, found, rtol=1e-4, atol=1e-5)
    assert len({round(score, 4) for score in found}) == 3


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "t5"])
def test_the_longest_text_is_read_and_a_longer_one_refused(name: str) -> None:
    """All four read twelve tokens; RoBERTa's table has one position more, which padding takes."""
    model, made = classifier(name), tokenizer("<bos> $A <eos>")
    assert usable_length(model) == 12
    scorer = RewardModel(model, made)
    assert np.isfinite(scorer(["p"], [" a" * 9], {})).all()
    with pytest.raises(RewardError, match=r"reads at most 12 tokens, but prompt and response have 13 in row 0"):
        scorer(["p"], [" a" * 10], {})


def test_t5_has_no_limit() -> None:
    assert usable_length(classifier("t5")) is None
