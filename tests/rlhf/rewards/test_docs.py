"""docs/rewards.md: its configuration and its function, as they stand there."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertModel

from rlhf import rewards
from rlhf.config import yaml_files as settings

DOCS = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")


def block(language: str, begin: str) -> str:
    """The block of code that begins with a text."""
    return next(code for code in re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL) if code.startswith(begin))


def test_the_configuration_works(tiny_bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(block("python", "def names_the_product"))
    (tmp_path / "mine.yaml").write_text(block("yaml", "name: support-replies"))
    tiny_bert(BertModel).rename(tmp_path / "encoder")
    monkeypatch.chdir("/")
    config = settings.load(tmp_path / "mine.yaml")
    columns = {
        "reference": ["Reset the Router of 2019.", "one two"],
        "target_words": [4, 1],
        "product": ["Router", "Modem"],
    }
    responses = ["Please reset the router", "Kind regards, the support team. Ticket #12"]
    scores, parts = rewards.make_rewards(config.ppo.rewards, None)(["p", "q"], responses, columns)
    assert parts["exact_word_count"][0] == 1.0
    assert parts["politeness"].tolist() == pytest.approx([1 / 3, 0.0])
    assert parts["signature"].tolist() == [0.0, 1.0]
    assert parts["names_the_product"].tolist() == [2.0, 0.0]
    weights = {"exact_word_count": 1.0, "politeness": 0.5, "meaning": 2.0, "signature": 0.2, "names_the_product": 0.3}
    assert set(parts) == set(weights)
    expected = sum(weight * parts[name] for name, weight in weights.items())
    assert scores.tolist() == pytest.approx(expected.tolist())
    for spec in config.evaluate.scorers.values():
        assert len(rewards.make_scorer(spec.function, spec.arguments)(["p", "q"], responses, columns)) == 2


@pytest.mark.slow
def test_the_configuration_runs(tiny_bert: Any, tmp_path: Path, rlhf: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "my_rewards.py").write_text(block("python", "def names_the_product"))
    (tmp_path / "mine.yaml").write_text(block("yaml", "name: support-replies"))
    tiny_bert(BertModel).rename(tmp_path / "encoder")
    with (tmp_path / "replies.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "response"), *((f"Reset {i}?", f"Press {i}.") for i in range(40))])
    question = {"reference": "Hold the Router for 3 seconds.", "target_words": 4, "product": "Router"}
    rows = [json.dumps({"prompt": f"How is {i} reset?", **question}) for i in range(40)]
    (tmp_path / "questions.jsonl").write_text("\n".join(rows) + "\n")
    code, out, error = rlhf("run", str(tmp_path / "mine.yaml"), "--json")
    assert code == 0, out + error
    metrics = {name: value for stage in json.loads(out)["stages"] for name, value in stage["metrics"].items()}
    assert {"ppo/updates", "evaluate/ppo/facts", "evaluate/ppo/overlap"} <= metrics.keys()


def test_the_overrides_work(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(block("yaml", "name: support-replies"))
    overrides = re.findall(r"`--set ([^`]*)`", DOCS)
    assert len(overrides) == 4
    found = settings.load(tmp_path / "mine.yaml", overrides=overrides).ppo.rewards
    assert found["signature"].arguments["words"] == ["regards"]
    assert (found["brevity"].weight, found["meaning"].weight, "politeness" in found) == (0.5, 3.0, False)
