"""What an evaluation leaves: report.json for programs and the page of a run, samples.parquet, and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlhf.metrics import plots
from rlhf.metrics.labels import label

Floats = NDArray[np.float64]
Report = dict[str, Any]
Columns = Mapping[str, Sequence[Any]]
PERCENTILES = (5, 25, 50, 75, 95)
_PAIRS = "Reward of the texts of held-out preference pairs"
CURVES = {"score_mean": "mean reward", "kl": "KL to the reference, nats"}


def distributions(scores: Mapping[str, Mapping[str, Floats]], metrics: Sequence[str], bins: int = 16) -> Report:
    """Percentiles, means and a common histogram of each metric: what the plots show, in numbers.

    ``scores[policy][metric]`` are values (n,), NaN where undefined; a policy without any value is left out.
    """
    found: Report = {}
    for metric in metrics:
        values = {name: known for name, of in scores.items() if len(known := _known(of.get(metric)))}
        if not values:
            continue
        edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=bins)
        found[metric] = {
            "percentiles": {
                name: dict(zip(map(str, PERCENTILES), np.percentile(known, PERCENTILES).tolist(), strict=True))
                for name, known in values.items()
            },
            "means": {name: float(known.mean()) for name, known in values.items()},
            "edges": edges.tolist(),
            "counts": {name: np.histogram(known, edges)[0].tolist() for name, known in values.items()},
        }
    return found


def write(out: Path, report: Report, scores: Mapping[str, Mapping[str, Floats]], samples: Columns) -> None:
    """Write report.json, samples.parquet and plots/*.png below ``out``.

    ``report`` is as ``rlhf.evaluate`` makes it; ``scores[policy][metric]`` are the values (n,) behind it, and those of
    texts that the reward model was trained on are under ``training``; ``samples`` are columns of n rows: prompt, one
    for each policy, and ``<policy>_<metric>``. The same input gives the same bytes.
    """
    (out / "report.json").write_text(json.dumps(finite(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    pq.write_table(pa.table(dict(samples)), out / "samples.parquet")
    _draw(out / "plots", report, scores)


def finite(value: Any) -> Any:
    """The same structure with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(folder: Path, report: Report, scores: Mapping[str, Mapping[str, Floats]]) -> None:
    found = report["distributions"]
    judged = [metric for metric in report["judged"] if metric in found]

    def values(metric: str) -> dict[str, Floats]:
        return {name: scores[name][metric] for name in found[metric]["counts"]}

    def bins(metric: str) -> tuple[list[float], dict[str, list[int]]]:
        return found[metric]["edges"], found[metric]["counts"]

    if judged:
        plots.boxplot(folder / "scores_boxplot.png", {label(metric).name: values(metric) for metric in judged})
        plots.histogram(folder / "scores_histogram.png", {label(metric).name: bins(metric) for metric in judged})
    if report["pairs"]:
        pairs = report["pairs"]["scores"]
        plots.histogram(folder / "pairs_histogram.png", {_PAIRS: (pairs["edges"], pairs["counts"])})
    if "length_tokens" in found:
        plots.boxplot(folder / "lengths.png", {label("length_tokens").name: values("length_tokens")})
    if report["overoptimisation"]:
        seen = report["overoptimisation"]
        series = {f"{label(seen['proxy']['name']).name}, which PPO is trained on": seen["proxy"]}
        series |= {label(name).name: of for name, of in seen["judges"].items()}
        plots.overoptimisation(folder / "overoptimisation.png", seen["kl"], series)
    if report["curves"]:
        panels = {CURVES[name]: report["curves"][name] for name in CURVES if name in report["curves"]}
        plots.curves(folder / "ppo_curves.png", report["curves"]["step"], panels)


def _known(values: Floats | None) -> Floats:
    return np.empty(0) if values is None else values[~np.isnan(values)]
