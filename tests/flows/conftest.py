"""A pipeline of stand-in stages: what flows, tasks, cache and tracking do does not depend on what a stage computes."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.context import Context
from rlhf.errors import DataError
from rlhf.stages import STAGES

PARTS = {
    "prepare": ("demonstrations", "preferences", "prompts", "base"),
    "sft": ("model",),
    "judge": ("preferences",),
    "reward": ("model", "scores.parquet"),
    "ppo": ("model", "curves.parquet"),
    "evaluate": ("report.json",),
}


class Calls(list[str]):
    """The stages that were computed, in order; ``fail`` names one that raises, ``change`` alters what one gives."""

    fail: str = ""
    change: str = ""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Replace every stage by one that copies its settings into its output, and record which of them ran."""
    calls = Calls()

    def stand_in(name: str) -> Callable[[Context], dict[str, float]]:
        def run(context: Context) -> dict[str, float]:
            calls.append(name)
            for step in (1, 2, 3):
                context.tracker.log({f"{name}/loss": 1.0 / step}, step)
                context.tracker.progress(step, 3, loss=1.0 / step)
            if calls.fail == name:
                raise DataError(f"{name} was told to fail")
            settings = context.config.model_dump_json(include={name}) if name != "prepare" else ""
            for part in PARTS[name]:
                (context.out / part).write_text(settings + (calls.change if name == "sft" else ""))
            return {f"{name}/result": 1.0}

        return run

    for name, stage in STAGES.items():
        module = types.ModuleType(f"stand_in_{name}")
        module.run = stand_in(name)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(STAGES, name, stage._replace(module=module.__name__))
    return calls


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The home folder of the test."""
    return tmp_path / "home"
