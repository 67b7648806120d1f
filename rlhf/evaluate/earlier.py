"""What the reward and ppo stages recorded, as the report of an evaluation has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rlhf.config.pipeline import PipelineConfig
from rlhf.context import Context
from rlhf.evaluate import output
from rlhf.evaluate.figures import Figures, Sure
from rlhf.rewards.registry import labels
from rlhf.statistics import intervals
from rlhf.statistics.intervals import Floats

JUDGE = "judge/"  # begins the column of a judge in ppo/evaluations.parquet


def training_scores(context: Context) -> dict[str, dict[str, Floats]]:
    """Scores of both sides of pairs that the reward model was trained on, under ``training``, ``reward``."""
    if not context.has("reward/scores.parquet"):
        return {}
    table = pq.read_table(context.input("reward/scores.parquet"), filters=[("split", "==", "train")])
    scores = np.concatenate([table[f"{side}_score"].to_numpy() for side in ("chosen", "rejected")])
    return {"training": {"reward": scores.astype(np.float64)}} if len(scores) else {}


def pairs(context: Context, sure: Sure) -> Figures | None:
    """Scores of both sides of the held-out preference pairs."""
    if not context.has("reward/scores.parquet"):
        return None
    table = pq.read_table(context.input("reward/scores.parquet"), filters=[("split", "==", "test")])
    chosen, rejected = (table[f"{side}_score"].to_numpy() for side in ("chosen", "rejected"))
    if not table.num_rows:
        return None
    sides = {"chosen": {"score": chosen}, "rejected": {"score": rejected}}
    return {
        "n": table.num_rows,
        "accuracy": intervals.win_rate(chosen, rejected, *sure)._asdict(),
        "scores": output.distributions(sides, ["score"])["score"],
    }


def curves(context: Context) -> dict[str, list[float]] | None:
    """Reward and KL of each PPO update."""
    if not context.has("ppo/curves.parquet"):
        return None
    table = pq.read_table(context.input("ppo/curves.parquet"))
    found: dict[str, list[float]] = table.select(["step", *output.CURVES]).to_pydict()
    return found


def overoptimisation(context: Context) -> Figures | None:
    """What PPO was trained on, the proxy, and each judge at its evaluations; None where there was none."""
    if not context.has("ppo/evaluations.parquet"):
        return None
    table: dict[str, list[Any]] = pq.read_table(context.input("ppo/evaluations.parquet")).to_pydict()
    names = [name.removeprefix(JUDGE) for name in table if name.startswith(JUDGE) and f"{name}_stderr" in table]
    return {
        "update": table["update"],
        "kl": table["kl"],
        "proxy": {"name": _proxy(context.config), "value": table["score"], "stderr": table["score_stderr"]},
        "judges": {
            name: {
                "value": table[JUDGE + name],
                "stderr": table[f"{JUDGE}{name}_stderr"],
                "alarm": table[f"overoptimised/{name}"],
            }
            for name in names
        },
    }


def _proxy(config: PipelineConfig) -> str:
    """What the score of PPO's training is called: as its reward if there is only one, else ``score``."""
    called = ["reward" if label == "model" else label for label in labels(config.ppo.rewards).values()]
    return called[0] if len(called) == 1 else "score"
