"""What docs/judge.md shows can be loaded and called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

from rlhf.config import yaml_files as settings
from rlhf.config.judge import Judge
from rlhf.judge.judges import ByComparison

DOCS = Path(__file__).parents[3] / "docs" / "judge.md"


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    return str(found)


def test_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(block("yaml"))
    config = settings.load(tmp_path / "mine.yaml")
    assert (config.judge.by, config.judge.samples, config.judge.gives) == ("rewards", 4, "rankings")


def test_the_comparison() -> None:
    names: dict[str, Any] = {}
    exec(compile(block("python"), "docs/judge.md", "exec"), names)
    judged = ByComparison(names["shorter"], "shorter").compare(["p", "p"], ["a", "aaa"], ["bb", "b"], {})
    assert judged.margins.tolist() == [1.0, -2.0]


def test_every_judge_is_in_the_table() -> None:
    for name in get_args(Judge.model_fields["by"].annotation):
        assert f"| `{name}` |" in DOCS.read_text("utf-8")
