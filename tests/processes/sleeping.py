"""The command line ``rlhf`` with stages that only sleep, and note when: for tests of how runs share slots.

    RLHF_TEST_SLEEPS='{"file": ..., "runs": 8, "seconds": {"ppo": 5.0}}' python tests/processes/sleeping.py sweep ...

A sweep's processes import this file again, as they are spawned, so that their stages sleep, too. ``prepare`` first
waits until so many runs are there, whose start-up is thus not counted.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flows.commands.cli import main
from rlhf.context import Context
from rlhf.runs.records import RECORD
from rlhf.stages import STAGES
from rlhf.store.locations import home_directory

PLAN = "RLHF_TEST_SLEEPS"
PARTS = {
    "prepare": ("demonstrations", "prompts", "base"),
    "sft": ("model",),
    "ppo": ("model", "curves.parquet"),
    "evaluate": ("report.json",),
}


class Sleep(NamedTuple):
    """What one stage did; times in unix seconds."""

    stage: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it really slept."""
        return self.end - self.begin


def sleeps(file: Path) -> list[Sleep]:
    """What the stages have noted, in the order of their ends."""
    return [Sleep(*json.loads(line)) for line in file.read_text().splitlines()]


def _sleeper(stage: str) -> Callable[[Context], dict[str, float]]:
    def run(context: Context) -> dict[str, float]:
        plan = json.loads(os.environ[PLAN])
        while stage == "prepare" and len(list((home_directory() / "runs").glob(f"*/{RECORD}"))) < plan["runs"]:
            time.sleep(0.05)
        begin = time.time()
        time.sleep(plan["seconds"][stage])
        with Path(plan["file"]).open("a") as file:
            file.write(json.dumps(Sleep(stage, begin, time.time())) + "\n")
        settings = "" if stage == "prepare" else context.config.model_dump_json(include={stage})
        for part in PARTS[stage]:  # runs that differ in a setting differ in what it gives, so that they go on apart
            (context.out / part).write_text(settings)
        return {}

    return run


if PLAN in os.environ:  # a test that imports this file for its names keeps the stages as they are
    for _name in PARTS:
        _module = types.ModuleType(f"sleeping_{_name}")
        _module.run = _sleeper(_name)  # type: ignore[attr-defined]
        sys.modules[_module.__name__] = _module
        STAGES[_name] = STAGES[_name]._replace(module=_module.__name__)

if __name__ == "__main__":
    sys.exit(main())
