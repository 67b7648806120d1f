"""A CSV file of 2 million rows, about 1 GB: memory stays bounded, and the time is that of ten files of a tenth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from tests.rlhf.data.large_csv import WORDS

ROOT = Path(__file__).parents[3]


def prepared(rows: int, folder: Path) -> dict[str, Any]:
    """What preparing so many rows took, in a process of its own; the model is a configuration and a tokenizer."""
    (folder / "model").mkdir(parents=True)
    vocabulary = {word: number for number, word in enumerate(("<unk>", "<end>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = {"eos_token": "<end>", "pad_token": "<end>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(folder / "model")
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=len(vocabulary), **ids).save_pretrained(folder / "model")
    script = str(Path(__file__).with_name("large_csv.py"))
    ran = subprocess.run(
        [sys.executable, script, str(rows), str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (folder / "large.csv").unlink()
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    assert found["rows"] == rows
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_million_rows(tmp_path: Path) -> None:
    before, large, after = (
        prepared(rows, tmp_path / name)
        for name, rows in (("before", 200_000), ("large", 2_000_000), ("after", 200_000))
    )
    assert large["bytes"] > 0.95e9
    assert large["peak_bytes"] < 1.5e9
    rates = [found["rows"] / found["cpu_seconds"] for found in (before, large, after)]
    small = sorted((rates[0], rates[2]))  # before and after, as the machine's speed changes
    assert 0.85 * small[0] < rates[1] < small[1] / 0.85
