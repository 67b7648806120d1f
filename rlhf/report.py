"""The report of an evaluation: report.json for programs, report.html for people, samples.parquet and plots.

The page is one file that needs no network. Model text is escaped, and the page's own policy forbids scripts.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from rlhf import plots
from rlhf.labels import LABELS, label
from rlhf.report_page import PAGE

Floats = NDArray[np.float64]
Report = dict[str, Any]
Columns = Mapping[str, Sequence[Any]]
PERCENTILES = (5, 25, 50, 75, 95)


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


def verdict(report: Report) -> str:
    """One sentence: did it get better?"""
    comparison = report["comparison"]
    if comparison is None:
        return "There is only one policy, so nothing to compare it with."
    new, old = comparison["candidate"].upper(), comparison["baseline"].upper()
    signs = {metric: _sign(difference) for metric, difference in comparison["differences"].items()}
    if not signs:
        return f"{new} and {old} were not scored: there is neither a reward model nor a scorer."
    if set(signs.values()) == {1}:
        return f"{new} is better than {old}" + (" by every score." if len(signs) > 1 else ".")
    if set(signs.values()) == {-1}:
        return f"{new} is worse than {old}" + (" by every score." if len(signs) > 1 else ".")
    if signs.get("reward") == 1 and -1 in signs.values():
        worse = _join([label(metric).name for metric, sign in signs.items() if sign == -1])
        return f"{new} has more reward than {old} but is worse by {worse}: the reward may be over-optimised."
    if set(signs.values()) == {0}:
        return f"No clear difference between {new} and {old}: the interval of each difference contains 0."
    parts = [
        f"{word} by {_join([label(metric).name for metric, sign in signs.items() if sign == value])}"
        for value, word in ((1, "better"), (-1, "worse"), (0, "not clearly different"))
        if value in signs.values()
    ]
    return f"{new} against {old}: {'; '.join(parts)}."


def summary(report: Report) -> list[str]:
    """By how much, how sure, and at what KL: a few sentences in plain text."""
    return [*_against_the_other(report), *_against_references(report)]


def _against_the_other(report: Report) -> list[str]:
    comparison = report["comparison"]
    if comparison is None:
        return []
    new, old = comparison["candidate"], comparison["baseline"]
    level = f"{100 * report['settings']['confidence']:g} % interval"
    lines = []
    for metric, difference in comparison["differences"].items():
        before, after = (report["metrics"][name][metric]["value"] for name in (old, new))
        win = comparison["win_rates"][metric]
        lines.append(
            f"{label(metric).name}: {number(before, 3)} to {number(after, 3)}, a change of "
            f"{number(difference['value'], 3, sign=True)} ({level} {number(difference['low'], 3, sign=True)} to "
            f"{number(difference['high'], 3, sign=True)}); {new.upper()} wins {percent(win['value'])} of "
            f"{win['n']} prompts against {old.upper()} ({percent(win['low'])} to {percent(win['high'])})."
        )
    kl = report["metrics"][new].get("kl")
    if kl is not None:
        lines.append(
            f"KL of {new.upper()} to {report['kl_reference'].upper()}: {number(kl['value'], 2)} nats per response "
            f"({number(kl['low'], 2)} to {number(kl['high'], 2)})."
        )
    return lines


def _against_references(report: Report) -> list[str]:
    compared = report["against_references"] or {"win_rates": {}}
    return [
        f"{label(metric).name}: {compared['candidate'].upper()} wins {percent(win['value'])} of {win['n']} prompts "
        f"against the references ({percent(win['low'])} to {percent(win['high'])})."
        for metric, win in compared["win_rates"].items()
        if win["n"]
    ]


def write(out: Path, report: Report, scores: Mapping[str, Mapping[str, Floats]], samples: Columns) -> None:
    """Write report.json, report.html, samples.parquet and plots/*.png below ``out``.

    ``report`` is as ``rlhf.evaluate`` makes it; ``scores[policy][metric]`` are the values (n,) behind it, and those of
    texts that the reward model was trained on are under ``training``; ``samples``
    are columns of n rows: prompt, one for each policy, and ``<policy>_<metric>``. The same input gives the same bytes.
    """
    (out / "report.json").write_text(json.dumps(finite(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    pq.write_table(pa.table(dict(samples)), out / "samples.parquet")
    _draw(out / "plots", report, scores)
    (out / "report.html").write_text(page(report, samples, out / "plots"), encoding="utf-8")


def page(report: Report, samples: Columns, plots_folder: Path) -> str:
    """The page as one HTML text. Plots that are not in ``plots_folder`` are left out."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, percent=percent, label=label)
    images = {
        path.stem: base64.b64encode(path.read_bytes()).decode("ascii") for path in sorted(plots_folder.glob("*.png"))
    }
    policies = list(report["metrics"])
    return environment.from_string(PAGE).render(
        report=report,
        verdict=verdict(report),
        summary=summary(report),
        policies=policies,
        metrics=[metric for metric in _order(report) if any(metric in report["metrics"][name] for name in policies)],
        images=images,
        samples=_chosen(samples, report),
        judged=report["judged"],
        percentiles=PERCENTILES,
    )


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number for people; a dash where there is none."""
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def percent(value: float | None) -> str:
    """A share as a percentage; a dash where there is none."""
    return "\N{EN DASH}" if value is None or math.isnan(value) else f"{100 * value:.0f} %"


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
    if report["curves"]:
        panels = {CURVES[name]: report["curves"][name] for name in CURVES if name in report["curves"]}
        plots.curves(folder / "ppo_curves.png", report["curves"]["step"], panels)


_PAIRS = "Reward of the texts of held-out preference pairs"
CURVES = {"score_mean": "mean reward", "kl": "KL to the reference, nats"}


def _chosen(samples: Columns, report: Report, first: int = 10, extremes: int = 3) -> list[dict[str, Any]]:
    """Some samples to show: the first ones, then those where the candidate lost and gained most by the first score."""
    count = len(samples["prompt"])
    rows: dict[int, str] = dict.fromkeys(range(min(first, count)), "")
    comparison = report["comparison"]
    if comparison is not None and comparison["differences"]:
        metric = next(iter(comparison["differences"]))
        new, old = (np.asarray(samples[f"{comparison[who]}_{metric}"]) for who in ("candidate", "baseline"))
        change = new - old
        order = [int(row) for row in np.argsort(change, kind="stable") if not np.isnan(change[row])]
        for title, found in (("largest loss", order[:extremes]), ("largest gain", order[::-1][:extremes])):
            rows |= {row: f"{title} by {label(metric).name}" for row in found if row not in rows}
    return [
        {**{name: column[row] for name, column in samples.items()}, "number": row + 1, "why": why}
        for row, why in rows.items()
    ]


def _order(report: Report) -> list[str]:
    return [*report["judged"], *(name for name in LABELS if name not in report["judged"])]


def _sign(difference: Mapping[str, float]) -> int:
    """1 or -1 where the interval of a difference is on one side of 0, else 0."""
    return 1 if difference["low"] > 0 else -1 if difference["high"] < 0 else 0


def _known(values: Floats | None) -> Floats:
    return np.empty(0) if values is None else values[~np.isnan(values)]


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
