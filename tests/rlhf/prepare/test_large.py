"""A large CSV file: memory stays bounded, and the time is that of as many rows in smaller files.

With 2 million rows, about 1 GB: ``RLHF_LARGE_ROWS=2000000 pytest tests/rlhf/prepare/test_large.py``. Then the buffers
are as large as they are; otherwise they are an eighth of that, so that fewer rows fill them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from rlhf.prepare import output, spool
from tests.rlhf.prepare.large_csv import WORDS

ROOT = Path(__file__).parents[3]
PART = 1 if "RLHF_LARGE_ROWS" in os.environ else 8  # of the buffers
LARGE = int(os.environ.get("RLHF_LARGE_ROWS", "100000"))
SMALL = 25_000 if PART > 1 else 100_000  # which fill the buffers, too


def prepared(folder: Path, *numbers: int) -> list[dict[str, Any]]:
    """What preparing so many rows took, each in a process of its own; the model is a configuration and a tokenizer."""
    vocabulary = {word: number for number, word in enumerate(("<unk>", "<end>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = {"eos_token": "<end>", "pad_token": "<end>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(folder / "model")
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=len(vocabulary), **ids).save_pretrained(folder / "model")
    script = str(Path(__file__).with_name("large_csv.py"))
    command = [sys.executable, script, str(folder), str(PART), *map(str, numbers)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [of["rows"] for of in found] == list(numbers)
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_large_files_take_their_time_and_little_memory(tmp_path: Path) -> None:
    before, large, after = prepared(tmp_path, SMALL, LARGE, SMALL)
    assert large["bytes"] > 475 * LARGE
    assert large["peak_bytes"] < 1.5e9
    assert max(spool.WRITE, spool.BUCKET, large["bytes"] / LARGE * output.ROW_GROUP) <= 2**26  # buffers as they are
    more_memory, more_data = (large[name] - before[name] for name in ("peak_bytes", "bytes"))
    assert more_memory < 0.8 * more_data  # texts that were kept would take more than their bytes
    rates = [found["rows"] / found["cpu_seconds"] for found in (before, large, after)]
    small = sorted((rates[0], rates[2]))  # before and after, as the machine's speed changes
    assert 0.85 * small[0] < rates[1] < small[1] / 0.85
