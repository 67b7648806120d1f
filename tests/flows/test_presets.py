"""Every preset runs from start to end without the hub: tiny models of its architectures, data of the same columns."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DebertaV2Config,
    DistilBertConfig,
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from rlhf.config.yaml_files import load, presets
from rlhf.models import loading
from rlhf.prepare.tokens import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ROWS = 120
SIDES = ("chosen", "rejected")
WORDS = ("river", "letter", "garden", "winter", "market", "bridge", "doctor", "engine", "window", "signal")


def sentence(number: int, length: int) -> str:
    return " ".join(WORDS[(number * 3 + i * (number % 4 + 1)) % 10] for i in range(length)) + "."


# -------------------------------------------------------------------------------------------------------------- models
def tokenizer(encoder: bool) -> PreTrainedTokenizerFast:
    made = train_tokenizer([sentence(i, 12) for i in range(60)], 400, 256)
    if encoder:
        made.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"})
        made.eos_token = made.bos_token = None
        ids = [(token, made.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=ids
        )
    return made


def tiny(kind: str, folder: Path) -> str:
    """A folder with a model of an architecture, as it would come from the hub."""
    made = tokenizer(encoder=kind in ("distilbert", "roberta", "deberta-v2"))
    end = made.eos_token_id if made.eos_token_id is not None else made.sep_token_id
    size: dict[str, Any] = {"vocab_size": len(made), "pad_token_id": made.pad_token_id, "eos_token_id": end}
    width = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    gpt = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 512}
    config: Any = {
        "gpt2": lambda: GPT2Config(**gpt, **size),
        "gpt_bigcode": lambda: GPTBigCodeConfig(**gpt, **size),
        "falcon": lambda: FalconConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=False, max_position_embeddings=512, **size
        ),
        "llama": lambda: LlamaConfig(**width, max_position_embeddings=512, **size),
        "t5": lambda: T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=made.pad_token_id, **size
        ),
        "distilbert": lambda: DistilBertConfig(
            dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=512, **size
        ),
        "roberta": lambda: RobertaConfig(**width, max_position_embeddings=1024, **size),
        "deberta-v2": lambda: DebertaV2Config(
            **width, max_position_embeddings=512, relative_attention=True, pos_att_type=["p2c", "c2p"],
            position_biased_input=False, **size,
        ),
    }[kind]()  # fmt: skip
    torch.manual_seed(0)
    family = AutoModel if made.eos_token is None else AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    if kind == "llama":
        made.chat_template = TEMPLATE
    loading.save(family.from_config(config), made, folder / kind)
    return str(folder / kind)


# ---------------------------------------------------------------------------------------------------------------- data
def table(folder: Path, name: str, columns: dict[str, list[Any]]) -> str:
    path = folder / name
    if path.suffix == ".parquet":
        pd.DataFrame(columns).to_parquet(path)
    else:
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def openai_comparisons(folder: Path) -> str:
    numbers = range(ROWS)
    posts = [{"id": str(i), "post": f"{sentence(i, 9)} {i}", "title": "t", "subreddit": "s"} for i in numbers]
    summaries = [[{"text": f" {sentence(i, 3 + i % 5)}"}, {"text": sentence(i + 1, 6)}] for i in numbers]
    return table(folder, "c.jsonl", {"info": posts, "summaries": summaries, "choice": [i % 2 for i in numbers]})


def flat_comparisons(folder: Path) -> str:
    prompts = [f"SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: {sentence(i, 9)} {i}\n\nTL;DR:" for i in range(ROWS)]
    sides = {side: [sentence(i + n, 4 + n) for i in range(ROWS)] for n, side in enumerate(SIDES)}
    return table(folder, "f.parquet", {"prompt": prompts, **sides})


def pairs(folder: Path, name: str = "pairs.jsonl") -> str:
    sides = {side: [f"{sentence(i + n, 3 + n)} {n}" for i in range(ROWS)] for n, side in enumerate(SIDES)}
    return table(folder, name, {"prompt": [f"{sentence(i, 5)} {i}?" for i in range(ROWS)], **sides})


def demonstrations(folder: Path, name: str) -> str:
    prompts = [f"{sentence(i, 5)} {i}?" for i in range(ROWS)]
    return table(folder, name, {"prompt": prompts, "response": [sentence(i, 4) for i in range(ROWS)]})


def conversations(folder: Path) -> str:
    def talk(i: int, n: int) -> list[dict[str, str]]:
        question = {"role": "user", "content": f"{sentence(i, 5)} {i}?"}
        return [question, {"role": "assistant", "content": sentence(i + n, 4 + n)}]

    columns: dict[str, list[Any]] = {side: [talk(i, n) for i in range(ROWS)] for n, side in enumerate(SIDES)}
    return table(folder, "u.jsonl", columns | {f"score_{side}": [1.0] * ROWS for side in SIDES})


def reviews(folder: Path) -> str:
    texts = [f"{sentence(i, 9)} {'awful' if i % 2 else 'great'} {i}" for i in range(2 * ROWS)]
    return table(folder, "r.parquet", {"text": texts, "label": [1 - i % 2 for i in range(2 * ROWS)]})


def word_count(folder: Path) -> dict[str, Any]:
    return {"data.prompts": openai_comparisons(folder), "model.path": tiny("llama", folder)}


def word_count_flat(folder: Path) -> dict[str, Any]:
    return {"data.prompts": flat_comparisons(folder), "model.path": tiny("llama", folder)}


def flan(folder: Path) -> dict[str, Any]:
    roberta = tiny("roberta", folder)
    return {
        "data.demonstrations": demonstrations(folder, "d.jsonl"), "data.preferences": pairs(folder),
        "model.path": tiny("t5", folder), "judge.model.path": roberta, "reward.path": roberta,
    }  # fmt: skip


def flan_with_gpt2(folder: Path) -> dict[str, Any]:
    return flan(folder) | {"model.path": tiny("gpt2", folder), "reward.path": tiny("distilbert", folder)}


def rules(kind: str) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"data.demonstrations": demonstrations(folder, "p.parquet"), "model.path": tiny(kind, folder)}


def ultrafeedback(folder: Path) -> dict[str, Any]:
    data = conversations(folder)
    return {"data.demonstrations": data, "data.preferences": data, "model.path": tiny("gpt2", folder)}


def imdb(folder: Path) -> dict[str, Any]:
    data = reviews(folder)
    paths = {"model.path": tiny("gpt2", folder), "reward.path": tiny("distilbert", folder)}
    return {"data.labelled": data, "data.prompts": data, **paths}


def brevity(folder: Path) -> dict[str, Any]:
    data = pairs(folder)
    paths = {"model.path": tiny("gpt2", folder), "reward.path": tiny("deberta-v2", folder)}
    return {"data.demonstrations": data, "data.preferences": data, **paths}


CASES: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "tldr-word-count": ("tldr-word-count", word_count),
    "tldr-word-count, flat": ("tldr-word-count", word_count_flat),
    "custom-flan-t5": ("custom-flan-t5", flan),
    "custom-flan-t5 with GPT-2": ("custom-flan-t5", flan_with_gpt2),
    "custom-reward-distilgpt2": ("custom-reward-distilgpt2", rules("gpt2")),
    "custom-reward with StarCoder's architecture": ("custom-reward-distilgpt2", rules("gpt_bigcode")),
    "custom-reward with Falcon": ("custom-reward-distilgpt2", rules("falcon")),
    "ultrafeedback-gpt2": ("ultrafeedback-gpt2", ultrafeedback),
    "imdb-sentiment": ("imdb-sentiment", imdb),
    "instruct-brevity": ("instruct-brevity", brevity),
}


def test_every_preset_is_run() -> None:
    assert {preset for preset, _ in CASES.values()} | {"demo"} == set(presets())


@pytest.mark.parametrize("name", presets())
def test_every_preset_says_what_it_is_and_has_a_small_size(name: str) -> None:
    preset = presets()[name]
    assert preset.description
    assert preset.needs
    assert "smoke" in preset.sizes
    assert load(name, size="smoke").name == name == load(name).name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_preset_runs(case: str, tmp_path: Path, rlhf: Callable[..., tuple[int, str, str]]) -> None:
    preset, make = CASES[case]
    settings = make(tmp_path) | {"data.validation_fraction": 0.1, "data.test_fraction": 0.2, "resources.threads": 1,
                                 "tracking.enabled": "false"}  # fmt: skip
    overrides = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    selected = (preset, "--size", "smoke", *overrides)
    for command in ("validate", "plan"):
        code, out, error = rlhf(command, *selected)
        assert code == 0, out + error
    code, out, error = rlhf("run", *selected, "--json")
    assert code == 0, out + error
    metrics = {name: value for stage in json.loads(out)["stages"] for name, value in stage["metrics"].items()}
    assert "evaluate/ppo/length_tokens" in metrics
    assert all(stage["action"] == "cached" for stage in json.loads(rlhf("plan", *selected, "--json")[1]))


@pytest.mark.slow
def test_the_configuration_of_the_docs_runs(tmp_path: Path, rlhf: Callable[..., tuple[int, str, str]]) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "systems.md").read_text("utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", docs, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    Path(reviews(tmp_path)).rename(tmp_path / "reviews.parquet")
    tiny("gpt2", tmp_path)
    config = load(tmp_path / "mine.yaml")
    assert (config.ppo.kl_coef, config.ppo.missing_eos, config.reward.path) == (0.1, "off", None)
    code, out, error = rlhf("run", str(tmp_path / "mine.yaml"), "--size", "smoke", "--json")
    assert code == 0, out + error
    stages = [stage["stage"] for stage in json.loads(out)["stages"]]
    assert stages == ["prepare", "reward", "ppo", "evaluate"]


def test_every_preset_is_in_the_table_of_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "systems.md").read_text("utf-8")
    for name in presets():
        assert name == "demo" or f"| `{name}` |" in text
