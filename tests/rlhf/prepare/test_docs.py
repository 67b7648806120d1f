"""What docs/data.md shows does what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf.config import yaml_files as settings
from rlhf.config.pipeline import PipelineConfig
from rlhf.models import loading
from rlhf.prepare.stage import check
from rlhf.prepare.tokens import train_tokenizer

DOCS = Path(__file__).parents[3] / "docs" / "data.md"
OFF: dict[str, Any] = dict.fromkeys(("sft", "judge", "reward", "ppo", "evaluate"), "off")
MODEL = {"init": "random", "layers": 1, "width": 8, "heads": 2, "vocab_size": 300}


def blocks(language: str) -> list[str]:
    """The blocks of code in a language, in their order."""
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The files that the configuration of ten lines names."""
    rows = [f'"Question {i}, please?",Reply number {i}.' for i in range(60)]
    (tmp_path / "replies.csv").write_text("question,reply\n" + "\n".join(rows) + "\n")
    (tmp_path / "pairs").mkdir()
    pair = [{"question": f"What of {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}."} for i in range(60)]
    text = "".join(json.dumps(row) + "\n" for row in [*pair[:30], {"question": "no sides"}])
    (tmp_path / "pairs" / "one.jsonl").write_text(text)
    import pandas as pd

    pd.DataFrame(pair[30:]).to_parquet(tmp_path / "more-pairs.parquet")
    tokenizer = train_tokenizer([row["question"] for row in pair], 300, 64)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=128, vocab_size=len(tokenizer), **ends)
    )
    loading.save(model, tokenizer, tmp_path / "model")
    (tmp_path / "support.yaml").write_text(blocks("yaml")[0])
    return tmp_path / "support.yaml"


def test_the_configuration_has_about_ten_lines() -> None:
    assert len(blocks("yaml")[0].splitlines()) <= 11


@pytest.mark.slow
def test_the_configuration_runs(project: Path, rlhf: Callable[..., tuple[int, str, str]]) -> None:
    code, out, error = rlhf("run", str(project), "--set", "tracking.enabled=false", "--json")
    assert code == 0, out + error
    stages = {row["stage"]: row for row in json.loads(out)["stages"]}
    assert list(stages) == ["prepare", "sft", "judge", "reward", "ppo", "evaluate"]
    assert stages["prepare"]["metrics"]["prepare/preferences_lost"] == 1


def test_rows_in_the_configuration() -> None:
    data = yaml.safe_load(blocks("yaml")[1])["data"]
    config = PipelineConfig.model_validate({**OFF, "model": MODEL, "data": data | {"test_fraction": 0}})
    assert config.data.has("demonstrations")
    assert config.data.has("preferences")


def test_computed_columns(tmp_path: Path) -> None:
    (tmp_path / "my_columns.py").write_text(blocks("python")[0])
    rows = [{"title": f"title {i}", "text": f"some words of text {i}"} for i in range(8)]
    (tmp_path / "articles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    off = "".join(f"{stage}: off\n" for stage in OFF)
    more = f"  test_fraction: 0\nmodel: {json.dumps(MODEL)}\n{off}"
    (tmp_path / "c.yaml").write_text(blocks("yaml")[2] + more)
    checked = check(settings.load(tmp_path / "c.yaml"))
    assert checked.kinds["prompts"].kept == 8


def test_every_reason_is_explained() -> None:
    for reason in ("bad", "empty", "duplicate", "leaked", "over_limit", "too_long", "unpaired", "tied"):
        assert f"`{reason}`" in DOCS.read_text("utf-8")
