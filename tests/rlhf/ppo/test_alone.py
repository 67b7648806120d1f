"""The engine by itself: the example of docs/ppo.md as it stands there, and what its import loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import rlhf.ppo
from rlhf.models import loading
from tests import quick_python

ROOT = Path(__file__).parents[3]


def example() -> str:
    """The first block of Python in docs/ppo.md."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_example_runs_as_it_stands(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a local model where it names one of the hub, and fewer updates."""
    loading.save(tiny.policy_model(), tiny.tokenizer(), tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    code = example().replace("updates=50, episodes=64", "updates=2, episodes=4, max_new_tokens=8")
    assert "updates=2" in code
    names: dict[str, Any] = {}
    exec(compile(code, "docs/ppo.md", "exec"), names)
    assert names["trainer"].progress.update == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "brief")


def test_the_example_has_few_lines() -> None:
    assert len([line for line in example().splitlines() if line.strip()]) <= 22


def test_it_needs_neither_the_pipeline_nor_its_libraries() -> None:
    code = "import sys\nimport rlhf.ppo.trainer\nprint(*sorted({name.split('.')[0] for name in sys.modules}))"
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.split())
    assert not loaded & {
        "prefect",
        "mlflow",
        "pydantic",
        "trl",
        "pandas",
        "pyarrow",
        "datasets",
        "evaluate",
        "flows",
        "tasks",
    }
    assert {"torch", "transformers", "accelerate"} <= loaded


def test_looking_at_options_loads_no_torch() -> None:
    code = "import sys\nfrom rlhf.ppo import Settings\nSettings()\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'Trainers'"):
        getattr(rlhf.ppo, "Trainers")  # noqa: B009


@pytest.mark.slow
@pytest.mark.parametrize("changes", [["--value", "shared", "--lora"], ["--dtype", "amp", "--arch", "llama-tiny"]])
def test_the_benchmark_runs(changes: list[str]) -> None:
    """One of them as a user starts it."""
    small = ["--prompts-per-batch", "4", "--prompt-len", "4", "--response-len", "4", "--updates", "1"]
    script = str(ROOT / "tests" / "bench" / "ppo_update.py")
    given = ["--peak-flops", "1e11", "--bandwidth", "1e10", "--device", "cpu"]
    python = [sys.executable, "-W", "ignore"] if "--lora" in changes else [quick_python.executable()]
    ran = subprocess.run(
        [*python, script, *small, *given, *changes],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert ran.returncode == 0, ran.stderr
    assert '"seconds_per_update"' in ran.stdout
