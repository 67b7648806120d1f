"""What a stage cost is in its manifest, and no part of what it made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.runs.records import read_runs
from rlhf.store.artifacts import Store, read_manifest
from tasks.mlflow.journal import PARENT, operations

Rlhf = Callable[..., tuple[int, str, str]]
RUN = ("run", "--set", "tracking.enabled=false")


def points(home: Path, run_id: str, prefix: str) -> list[tuple[list[str], set[str]]]:
    """The runs and names of the points in a run's journal whose names begin so."""
    found = [o.record for o in operations(home / "runs" / run_id) if o.record["op"] == "metrics"]
    named = [(o["runs"], {name for name in o["values"] if name.startswith(prefix)}) for o in found]
    return [(runs, names) for runs, names in named if names]


@pytest.mark.usefixtures("run_once")
def test_the_cost_of_a_stage_is_kept_with_it(rlhf: Rlhf, home: Path) -> None:
    code, _, error = rlhf(*RUN, "--only", "evaluate")
    assert code == 0, error
    store, (first, second) = Store(home), read_runs(home)
    costs: dict[str, Any] = {}
    for stage, row in first.stages.items():
        manifest = store.open(stage, row["key"])
        costs[stage] = manifest.cost
        assert manifest.cost["peak_memory_bytes"] > 1e7
        assert "system/cpu_utilization_percentage" not in (store.path(stage, row["key"]) / "metrics.jsonl").read_text()
    system = points(home, first.id, "system/")
    assert {runs[0] for runs, _ in system} == set(first.stages)
    assert all(PARENT not in runs for runs, _ in system)
    assert {runs[0] for runs, _ in points(home, second.id, "system/")} == {"evaluate"}  # the others computed nothing
    cached = {name for _, names in points(home, second.id, "cost/sft/") for name in names}
    assert cached == {"cost/sft/seconds", *(f"cost/sft/{name}" for name in costs["sft"])}
    assert second.stages["evaluate"]["digest"] == first.stages["evaluate"]["digest"]


def test_a_manifest_from_before_costs_were_known_is_read(run_once: Path, home: Path) -> None:
    [path] = (home / "ledger" / "prepare").glob("*.json")
    old = json.loads(path.read_text())
    del old["cost"]
    path.write_text(json.dumps(old))
    assert read_manifest(path).cost == {}
