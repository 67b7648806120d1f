"""What tests ask an MLflow store."""

from __future__ import annotations

from collections import Counter

from mlflow import MlflowClient
from mlflow.entities import Run


def runs_of(uri: str, run_id: str) -> dict[str, Run]:
    """MLflow runs by stage; fails when there are two of one."""
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`rlhf.run_id` = '{run_id}'")
    stages = Counter(run.data.tags["rlhf.stage"] for run in found)
    assert set(stages.values()) <= {1}, stages
    return {run.data.tags["rlhf.stage"]: run for run in found}


def history(uri: str, run: Run, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in MlflowClient(uri).get_metric_history(run.info.run_id, name))
