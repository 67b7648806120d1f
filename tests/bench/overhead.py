"""What a run costs beside its stages: `rlhf up` computes the demo at smoke size, and runs it again from the cache.

    python -m tests.bench.overhead [RUNS [KIND ...]]

Prints JSON, medians in seconds. Kinds: `cached` is a run through the worker of which every stage comes from the cache,
`computed` one with a seed of its own, of which none does, and `command` the latter by `rlhf run`; default: all.

- submission: from the request until the worker takes the run; it looks for some every 2 s
- start: from then until the flow runs: a new process, which imports Prefect and the flow
- flow: from then until the run's last state
- stages: what the stages computed took by their manifests, with what they import
- added: flow less stages. What the flow itself imports is in `start`; torch, TRL and transformers are in `stages`
- import: of MLflow in a process of its own, as the one that ships has it, which goes on beside the stages that compute
- less import: of a run from the cache, which waits for that: added less import
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlhf.runs.records import read_runs
from tests.team.conftest import Up, started

SETTINGS = ("resources.threads=1",)
KINDS = ("cached", "computed", "command")


def by_worker(up: Up, seed: int) -> dict[str, float]:
    """Ask for a run, and wait for it; its parts in seconds."""
    run = up.submit("preset/run", preset="demo", size="smoke", overrides=[*SETTINGS, f"seed={seed}"])
    state = up.finish(run)
    if state != "COMPLETED":
        raise RuntimeError(f"the run {run} ended as {state}; see {up.home / 'logs'}")
    states = up.api("GET", f"flow_run_states/?flow_run_id={run}")
    at = {one["type"]: datetime.fromisoformat(one["timestamp"]).timestamp() for one in states}
    flow = at["COMPLETED"] - at["RUNNING"]
    stages, importing = computed(up.home), import_of_mlflow()
    return {
        "submission": at["PENDING"] - at["SCHEDULED"],
        "start": at["RUNNING"] - at["PENDING"],
        "flow": flow,
        "stages": stages,
        "added": flow - stages,
        "import": importing,
        **({} if stages else {"less import": flow - importing}),
        "from start": at["COMPLETED"] - at["PENDING"],
        "from submission": at["COMPLETED"] - at["SCHEDULED"],
    }


def import_of_mlflow() -> float:
    """Seconds that a new process takes to import MLflow, without those of starting Python."""
    code = "import time; began = time.perf_counter(); import mlflow; print(time.perf_counter() - began)"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return float(said)


def by_command(home: Path, seed: int) -> dict[str, float]:
    """One `rlhf run`; its parts in seconds."""
    settings = [word for setting in (*SETTINGS, f"seed={seed}") for word in ("--set", setting)]
    subprocess.run(
        [sys.executable, "-m", "flows.commands.cli", "run", "demo", "--size", "smoke", "--home", str(home), *settings],
        check=True,
        stdout=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "RLHF", "MLFLOW_T"))},
    )
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        row = database.execute("SELECT start_time, end_time FROM flow_run ORDER BY start_time DESC LIMIT 1").fetchone()
    begin, end = (datetime.fromisoformat(text).timestamp() for text in row)
    return {"flow": end - begin, "stages": computed(home), "added": end - begin - computed(home)}


def computed(home: Path) -> float:
    """Seconds of the stages that the last run computed."""
    return sum(row["seconds"] for row in read_runs(home)[-1].stages.values() if not row["cached"])


def medians(rows: list[dict[str, float]]) -> dict[str, Any]:
    """The median of each part, and each run's."""
    middle = {name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]}
    return {"median": middle, "each": [{name: round(value, 2) for name, value in row.items()} for row in rows]}


def main(runs: int, kinds: Collection[str]) -> None:
    """Measure, and print."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        if {*kinds} & {"cached", "computed"}:
            with started(Path(folder) / "team") as up:
                by_worker(up, 0)  # the first one of a server makes more than the others do
                for seed in range(1, runs + 1):
                    if "computed" in kinds:
                        found["computed"].append(by_worker(up, seed))
                    if "cached" in kinds:
                        found["cached"].append(by_worker(up, seed if "computed" in kinds else 0))
        for seed in range(runs + 1 if "command" in kinds else 0):
            row = by_command(Path(folder) / "alone", seed)
            found["command"] += [row] if seed else []
    print(json.dumps({
        **{name: medians(rows) for name, rows in found.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("prefect", "mlflow", "torch")},
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, sys.argv[2:] or KINDS)
