"""Runs that were never run: records, manifests and an evaluation's samples, by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.cache.plan import key_of
from rlhf.runs.records import RunRecord
from rlhf.store.artifacts import Store, make_manifest

CONFIG = {
    "seed": 1,
    "ppo": {"enabled": True, "kl_coef": 0.4},
    "evaluate": {"confidence": 0.95, "bootstrap": 200, "scorers": {"gold": {"function": "g.py:gold"}}},
    "resources": {"device": "cpu"},
}
CODE = {"code rlhf/ppo/core.py": "c" * 64, "library torch": "2.13.0"}


def samples(
    prompts: Sequence[str],
    values: Mapping[str, Sequence[float]],
    texts: Mapping[str, Sequence[str | None]] | None = None,
) -> pa.Table:
    """An evaluation's samples; texts that are not given are the prompts with the policy's name."""
    given = {policy: [f"{policy} on {prompt}" for prompt in prompts] for policy in ("sft", "ppo")} | dict(texts or {})
    reference = given.pop("reference", [f"reference of {prompt}" for prompt in prompts])
    return pa.table({"prompt": list(prompts), "reference": reference, **given, **values})


def make_run(
    home: Path,
    run_id: str,
    table: pa.Table | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    ingredients: Mapping[str, Mapping[str, Any]] | None = None,
    metrics: Mapping[str, float] | None = None,
    pipeline: str = "demo",
    status: Any = "done",
    started: float = 1_700_000_000.0,
) -> RunRecord:
    """Write a run of prepare, ppo and evaluate; a stage with the ingredients of an earlier one is that one.

    Args:
        table: the samples; the means of their numbers are final figures.
        config: sections that differ from ``CONFIG``.
        ingredients: of a stage, those that differ from the usual.
        metrics: further final figures of the evaluation.
    """
    store = Store(home)
    settings = {**CONFIG, **(config or {})}
    usual = {
        "prepare": {"data.demonstrations[0] train.jsonl": "d" * 64},
        "ppo": {"config.ppo.kl_coef": settings["ppo"]["kl_coef"], **CODE},
        "evaluate": {
            "config.evaluate.scorers.gold.function": "g.py:gold",
            "function g.py:gold: g.py": "9" * 64,
            "input reward/model": "a" * 64,
            "input ppo/model": str(settings["ppo"]["kl_coef"]),
            **CODE,
        },
    }
    stages = {}
    for stage, table_of in usual.items():
        made: dict[str, Any] = {**table_of, **(ingredients or {}).get(stage, {})}
        made = {name: value for name, value in made.items() if value is not None}
        key = key_of(made | {"stage": stage})
        known = store.remembered(stage, key)
        if known is None:
            out = store.work_directory(stage, key) / "out"
            out.mkdir(parents=True)
            (out / "content").write_text(stage if stage == "prepare" else str(made))
            finals: dict[str, float] = {}
            if stage == "evaluate" and table is not None:
                pq.write_table(table, out / "samples.parquet")
                finals = _finals(table) | dict(metrics or {})
            known = make_manifest(
                out,
                stage=stage,
                key=key,
                ingredients=made,
                pipeline=pipeline,
                metrics=finals,
                run_id=run_id,
                device="cpu",
            )
            store.publish(out, known)
        stages[stage] = {"key": key, "digest": known.digest, "cached": known.run_id != run_id, "seconds": 1.0}
    record = RunRecord(run_id, pipeline, status, started, started + 60, config=settings, stages=stages)
    record.write(home)
    return record


def _finals(table: pa.Table) -> dict[str, float]:
    """The mean of each column of numbers, under the name of its figure."""
    found = {}
    for name in table.column_names:
        policy, _, metric = name.partition("_")
        if metric and pa.types.is_floating(table[name].type):
            found[f"evaluate/{policy}/{metric}"] = float(np.nanmean(table[name].to_numpy()))
    return found
