"""The context of an encoder-decoder: the prompt and the response may be as long as it each, as ``models.fits`` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import BartConfig

from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import ConfigError
from rlhf.models import loading
from rlhf.prepare.stage import check
from rlhf.prepare.tokens import END, context_length, train_tokenizer

CONTEXT = 16
OFF: dict[str, Any] = dict.fromkeys(("sft", "judge", "reward", "evaluate"), "off")


@pytest.fixture
def bart(tmp_path: Path) -> Path:
    """A configuration, and a tokenizer that puts one special token before each text and one behind; no weights."""
    tokenizer = train_tokenizer(["aaaa"], 257, CONTEXT)  # a token a letter
    ends = [(END, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{END} $A {END}", special_tokens=ends)
    tokenizer.save_pretrained(tmp_path / "bart")
    BartConfig(max_position_embeddings=CONTEXT, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "bart")
    return tmp_path / "bart"


def config(model: Path, rows: list[dict[str, str]], **ppo: Any) -> PipelineConfig:
    data = {"rows": rows, "validation_fraction": 0.0, "test_fraction": 0.0, "too_long": "drop"}
    sections = {
        "model": {"path": str(model)},
        "data": data,
        "ppo": {"rewards": {"brevity": 1}, **ppo} if ppo else "off",
    }
    return PipelineConfig.model_validate({**OFF, **sections})


def test_each_half_has_the_context(bart: Path) -> None:
    tokenizer, policy = loading.load_tokenizer(bart), loading.load_config(bart)
    rows = [{"prompt": "p" * p, "response": "r" * r} for p in (13, 14, 15) for r in (14, 15, 16)]
    read = loading.prompt_token_ids(tokenizer, [row["prompt"] for row in rows], encoder=True)
    fit = [loading.fits(policy, len(ids), len(row["response"]) + 1) for ids, row in zip(read, rows, strict=True)]
    sized = check(config(bart, rows)).kinds["demonstrations"]
    assert (sized.kept, sized.lost["too_long"]) == (sum(fit), len(rows) - sum(fit)) == (4, 5)
    assert sized.tokens["prompt"]["max"] == CONTEXT
    assert context_length(config(bart, rows).model) == (CONTEXT, True)


def test_a_pair_is_one_text_of_the_reward_model(bart: Path) -> None:
    rows = [{"prompt": "pppp", "chosen": "c" * length, "rejected": "r"} for length in (10, 11)]
    assert check(config(bart, rows)).kinds["preferences"].kept == 1


def test_prompts_leave_all_of_the_decoder(bart: Path) -> None:
    rows = [{"prompt": "p" * 14}]
    sampled = {"max_new_tokens": CONTEXT, "eval_every": 0}
    assert check(config(bart, rows, **sampled)).kinds["prompts"].kept == 1
    with pytest.raises(ConfigError, match=r"ppo\.max_new_tokens is 17, but the model's context is 16; lower it"):
        check(config(bart, rows, **sampled | {"max_new_tokens": 17}))
