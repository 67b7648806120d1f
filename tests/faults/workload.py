"""The run that is disturbed: a tiny pipeline whose PPO notes, in a file of its reward, which updates it computes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.config.pipeline import PipelineConfig

REWARDS = """import hashlib, os, time

def noted(prompts, responses, trial):
    if len(prompts) != {evaluated}:
        note(prompts, responses, trial)
    return [len(set(response)) / (1 + len(response)) for response in responses]

def note(prompts, responses, trial):
    asked = hashlib.sha256(repr(list(zip(prompts, responses))).encode()).hexdigest()[:16]
    with open({file!r}, "a") as log:
        log.write(f"{{trial}} {{os.environ.get('RANK', '0')}} {{asked}}\\n")
    time.sleep(0.2)  # so that there is some time to be disturbed in
"""
UPDATES = 30
EVALUATED = 5  # prompts of the evaluation, which asks the reward, too; no update asks about as many
CALLS = "calls.txt"


def write(folder: Path) -> None:
    """The data and the reward function."""
    rows = [{"prompt": f"What is {i} plus {i}?", "response": f"It is {2 * i}."} for i in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    (folder / "noted.py").write_text(REWARDS.format(file=str(folder / CALLS), evaluated=EVALUATED))


def config(folder: Path, trial: str, processes: int = 1) -> PipelineConfig:
    """Its configuration. ``trial`` changes the keys of ``ppo`` and of what follows, and not a number in them."""
    values = {
        "name": "disturbed",
        "data": {
            "demonstrations": [str(folder / "data.parquet")],
            "validation_fraction": 0.2,
            "test_fraction": 0.3,
        },
        "model": {"init": "random", "layers": 1, "width": 8, "heads": 2, "context": 64, "vocab_size": 300},
        "sft": {"max_steps": 4, "batch_size": 4},
        "judge": "off",
        "reward": "off",
        "ppo": {
            "rewards": {f"{folder / 'noted.py'}:noted": {"weight": 1.0, "arguments": {"trial": trial}}},
            "updates": UPDATES,
            "checkpoint_every": 1,
            "episodes": 4,
            "minibatches": 1,
            "max_new_tokens": 8,
        },
        "evaluate": {"prompts": EVALUATED, "max_new_tokens": 4, "bootstrap": 20, "scorers": {"brief": "brevity"}},
        "resources": {"threads": 1, "processes": processes, "device": "cpu"},
    }
    return PipelineConfig.model_validate(values)


def calls(folder: Path, trial: str) -> list[tuple[str, str]]:
    """Each call of a trial's reward, in order: the process that made it, and a digest of what it was asked about."""
    path = folder / CALLS
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(rank, asked) for name, rank, asked in lines if name == trial]


def weights(home: Path, trial: str) -> str:
    """A digest of the weights that PPO gave; empty where there is none."""
    for path in (home / "store" / "ppo").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        if any(value == trial for name, value in manifest["ingredients"].items() if name.endswith("trial")):
            return hashlib.sha256(manifest["parts"]["model"].encode()).hexdigest()[:16]
    return ""
