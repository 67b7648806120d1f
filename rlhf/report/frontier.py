"""Reward and judges over the distance from the reference policy: where more of the one is less of the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.report import charts
from rlhf.report.charts import Curve
from rlhf.report.model import Figure, Section, Sources, Table
from rlhf.report.words import number, score_name, significant

NAN = math.nan
LOOKS = ("one", "three", "four", "five")  # of judges; none is like that of the reward


def overoptimisation(sources: Sources) -> Section | None:
    """The reward that PPO raises, and judges it never sees, over the distance from the reference."""
    found = sources.evaluation.get("overoptimisation") or from_ppo(sources)
    if not found or not found.get("update"):
        return None
    roots = [math.sqrt(max(0.0, kl)) if kl is not None else NAN for kl in found["kl"]]
    order = sorted(range(len(roots)), key=lambda i: (math.isnan(roots[i]), roots[i]))
    proxy, judges = found["proxy"], found.get("judges") or {}
    series = [(f"{score_name(proxy.get('name', 'reward'))} (trained on)", "proxy", proxy)]
    series += [(score_name(name), LOOKS[i % len(LOOKS)], of) for i, (name, of) in enumerate(judges.items())]
    curves = [_gain(name, look, roots, order, of) for name, look, of in series]
    budget = sources.config.ppo.kl_budget if sources.config is not None else None
    upright = {"KL budget": math.sqrt(budget)} if budget is not None and math.sqrt(budget) <= 1.5 * max(roots) else {}
    gain = charts.lines(
        curves, "Over-optimisation", "√KL to the reference (nats a response)", "gain, in standard errors", dots=True,
        whole=False, upright=upright,
    )  # fmt: skip
    table = _evaluations(found, roots, series)
    note = "Each in its own mean standard error, which is also the width of its band."
    figures = [Figure("Gain since the start", gain, [table], [(c.look, c.name) for c in curves], note)]
    figures += [_frontier(name, look, roots, order, of, found, table) for name, look, of in series]
    words = [
        "A reward that rises while an independent judge falls is over-optimised (Gao et al. 2023). "
        + ("A triangle marks an evaluation at which the alarm was on." if _rang(judges) else "No alarm went off.")
        if judges
        else "PPO had no judge beside its reward, so that over-optimisation could not be seen.",
        "Bands are standard errors.",
    ]
    return Section("overoptimisation", "Reward against KL", words, figures=figures)


def from_ppo(sources: Sources) -> dict[str, Any] | None:
    """The same from ppo/evaluations.parquet, for a run that was not evaluated; None where there is none."""
    path = sources.file("ppo", "evaluations.parquet")
    if path is None:
        return None
    import pyarrow.parquet as pq  # takes a moment

    columns: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    names = [c.removeprefix("judge/") for c in columns if c.startswith("judge/") and not c.endswith("_stderr")]
    return {
        "update": columns.get("update", []),
        "kl": columns.get("kl", []),
        "proxy": {"name": "reward", "value": columns["score"], "stderr": columns.get("score_stderr", [])},
        "judges": {
            name: {
                "value": columns[f"judge/{name}"],
                "stderr": columns.get(f"judge/{name}_stderr", []),
                "alarm": columns.get(f"overoptimised/{name}", []),
            }
            for name in names
        },
    }


def _rang(judges: Mapping[str, Mapping[str, Any]]) -> bool:
    return any(alarm for of in judges.values() for alarm in of.get("alarm") or [])


def _gain(name: str, look: str, roots: Sequence[float], order: Sequence[int], of: Mapping[str, Any]) -> Curve:
    """A curve's gain since the first evaluation, over its mean standard error."""
    values, errors = _floats(of["value"]), _floats(of.get("stderr") or [])
    known = [error for error in errors if math.isfinite(error) and error > 0]
    unit = sum(known) / len(known) if known else 1.0
    start = values[0]
    y = [(values[i] - start) / unit for i in order]
    alarm = of.get("alarm") or []
    band = [errors[i] / unit for i in order] if len(errors) == len(values) else []
    low, high = [a - b for a, b in zip(y, band, strict=False)], [a + b for a, b in zip(y, band, strict=False)]
    marked = [bool(alarm[i]) for i in order] if len(alarm) == len(values) else ()
    return Curve(name, look, [roots[i] for i in order], y, low, high, marked)


def _frontier(
    name: str, look: str, roots: Sequence[float], order: Sequence[int], of: Mapping[str, Any], found: Any, table: Table
) -> Figure:
    """One score in its own unit."""
    values, errors = _floats(of["value"]), _floats(of.get("stderr") or [])
    y = [values[i] for i in order]
    band = [errors[i] for i in order] if len(errors) == len(values) else []
    low, high = [a - b for a, b in zip(y, band, strict=False)], [a + b for a, b in zip(y, band, strict=False)]
    curve = Curve(name, look, [roots[i] for i in order], y, low, high)
    picture = charts.lines([curve], name, "√KL to the reference", "", dots=True, whole=False)
    return Figure(name, picture, [table])


def _evaluations(found: Mapping[str, Any], roots: Sequence[float], series: Sequence[Any]) -> Table:
    rows = []
    for i, update in enumerate(found["update"]):
        cells = []
        for _, _, of in series:
            errors, alarm = of.get("stderr") or [], of.get("alarm") or []
            error = f" ± {significant(errors[i])}" if i < len(errors) and errors[i] is not None else ""
            cells.append(significant(of["value"][i]) + error + (" (alarm)" if i < len(alarm) and alarm[i] else ""))
        rows.append((f"{update:g}", number(found["kl"][i], 3), number(roots[i], 3), *cells))
    return Table(
        "Evaluations during PPO, ± standard error", ("Update", "KL", "√KL", *(name for name, _, _ in series)), rows
    )


def _floats(values: Sequence[Any]) -> list[float]:
    return [NAN if value is None else float(value) for value in values]
