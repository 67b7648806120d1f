"""Reward and judges over the distance from the reference policy: where more of the one is less of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.report import charts
from rlhf.report.charts import Curve
from rlhf.report.sources import Figure, Section, Sources, Table
from rlhf.report.words import number, score_name, significant

NAN = math.nan
PLUS_MINUS = "\N{NO-BREAK SPACE}\N{PLUS-MINUS SIGN}\N{NO-BREAK SPACE}"
LOOKS = ("one", "three", "four", "five")  # of judges; none is like that of the reward


class Score(NamedTuple):
    """What the evaluations of PPO found of one score, in the order of the roots; NaN where there is no value."""

    name: str
    look: str
    values: list[float]
    errors: list[float]
    alarms: list[bool]


class Walk(NamedTuple):
    """The evaluations in the order of their distance from the reference."""

    updates: list[float]
    kl: list[float]
    roots: list[float]
    scores: list[Score]


def overoptimisation(sources: Sources) -> Section | None:
    """The reward that PPO raises, and judges it never sees, over the distance from the reference."""
    found = sources.evaluation.get("overoptimisation") or from_ppo(sources)
    if not found or not found.get("update"):
        return None
    walk = _walk(found)
    judged, rang = len(walk.scores) > 1, any(any(score.alarms) for score in walk.scores)
    alarm = "A triangle marks an evaluation at which the alarm was on." if rang else "No alarm went off."
    words = [
        f"A reward that rises while an independent judge falls is over-optimised (Gao et al. 2023). {alarm}"
        if judged
        else "PPO had no judge beside its reward, so that over-optimisation could not be seen.",
        "Bands are standard errors.",
    ]
    figures = [_gains(walk, _budget(sources, walk.roots))] if judged else []
    return Section("overoptimisation", "Reward against KL", words, figures=[*figures, *map(_alone(walk), walk.scores)])


def _walk(found: Mapping[str, Any]) -> Walk:
    """The evaluations as report.json has them, ordered by KL."""
    kl = _floats(found["kl"])
    order = sorted(range(len(kl)), key=lambda i: (math.isnan(kl[i]), kl[i]))

    def score(name: str, look: str, of: Mapping[str, Any]) -> Score:
        values, errors = _floats(of["value"]), _floats(of.get("stderr") or [NAN] * len(kl))
        alarms = [bool(on) for on in of.get("alarm") or [False] * len(kl)]
        return Score(name, look, [values[i] for i in order], [errors[i] for i in order], [alarms[i] for i in order])

    proxy = found["proxy"]
    scores = [score(f"{score_name(proxy.get('name', 'reward'))} (trained on)", "proxy", proxy)]
    for place, (name, of) in enumerate((found.get("judges") or {}).items()):
        scores.append(score(score_name(name), LOOKS[place % len(LOOKS)], of))
    ordered = [kl[i] for i in order]
    return Walk([found["update"][i] for i in order], ordered, [math.sqrt(max(0.0, of)) for of in ordered], scores)


def _budget(sources: Sources, roots: Sequence[float]) -> dict[str, float]:
    """Where the KL budget is, if it is near."""
    budget = sources.config.ppo.kl_budget if sources.config is not None else None
    near = budget is not None and math.sqrt(budget) <= 1.5 * max(root for root in roots if root == root)
    return {"KL budget": math.sqrt(budget)} if budget is not None and near else {}


def _gains(walk: Walk, upright: Mapping[str, float]) -> Figure:
    """All scores in one chart: the gain of each since the first evaluation, over its mean standard error."""
    curves = []
    start = walk.updates.index(min(walk.updates))
    for score in walk.scores:
        known = [error for error in score.errors if error > 0]
        curves.append(_curve(walk, score, score.values[start], sum(known) / len(known) if known else 1.0))
    title, x_label = "Gain since the start", "√KL to the reference (nats a response)"
    picture = charts.lines(
        curves, title, x_label, "gain, in standard errors", dots=True, whole=False, upright=upright
    )  # fmt: skip
    legend = [(score.look, score.name) for score in walk.scores]
    note = "Each in its own mean standard error, which is also the width of its band."
    return Figure(title, picture, [_table(walk, walk.scores)], legend, note)


def _alone(walk: Walk) -> Callable[[Score], Figure]:
    """Draws one score in its own unit."""

    def draw(score: Score) -> Figure:
        curve = _curve(walk, score, 0.0, 1.0)
        picture = charts.lines([curve], score.name, "√KL to the reference", "", dots=True, whole=False)
        return Figure(score.name, picture, [_table(walk, [score])])

    return draw


def _curve(walk: Walk, score: Score, start: float, unit: float) -> Curve:
    y = [(value - start) / unit for value in score.values]
    errors = [0.0 if math.isnan(error) else error / unit for error in score.errors]
    low, high = ([a + sign * b for a, b in zip(y, errors, strict=True)] for sign in (-1, 1))
    return Curve(score.name, score.look, walk.roots, y, low, high, score.alarms)


def _table(walk: Walk, scores: Sequence[Score]) -> Table:
    rows = []
    for i, update in enumerate(walk.updates):
        cells = []
        for score in scores:
            error = "" if math.isnan(score.errors[i]) else f"{PLUS_MINUS}{significant(score.errors[i])}"
            cells.append(f"{significant(score.values[i])}{error}{' (alarm)' if score.alarms[i] else ''}")
        rows.append((f"{update:g}", number(walk.kl[i], 3), number(walk.roots[i], 3), *cells))
    head = ("Update", "KL", "√KL", *(score.name for score in scores))
    return Table("Evaluations during PPO, ± standard error", head, rows)


def _floats(values: Sequence[Any]) -> list[float]:
    return [NAN if value is None else float(value) for value in values]


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
