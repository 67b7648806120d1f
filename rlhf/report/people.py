"""What people said of the responses, on blind sheets (``rlhf sheet``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rlhf.report import charts
from rlhf.report.charts import Dot
from rlhf.report.results import pair_of, three
from rlhf.report.sources import Figure, Section, Sources, Table
from rlhf.report.words import interval, number, percent, percents, score_name

KAPPA = "Cohen’s kappa is 1 where two readers always agree, and 0 where they agree as often as by chance."


def people(sources: Sources) -> Section | None:
    """Each reader's verdicts, how often each score agrees with them, and two readers with each other."""
    kept = _kept(sources)
    readers: Mapping[str, Mapping[str, Any]] = kept.get("readers") or {}
    if not readers:
        return None
    dots = [
        Dot(
            f"{name}: {pair_of(of)}",
            charts.OTHERS[i % len(charts.OTHERS)],
            three(of["win_rate"]),
            percents(of["win_rate"]),
        )
        for i, (name, of) in enumerate(readers.items())
    ]
    rows = [
        (name, pair_of(of), percents(of["win_rate"]), *(percent(of.get(kind)) for kind in ("wins", "ties", "losses")),
         f"{len(of.get('rows') or []):,}")
        for name, of in readers.items()
    ]  # fmt: skip
    head = ("Reader", "of", "win rate", "wins", "ties", "losses", "prompts")
    picture = charts.dots(dots, "Win rates by people", "win rate", middle=0.5, limits=(0.0, 1.0))
    figures = [Figure("Win rates by people", picture, [Table("What each reader said", head, rows, frozenset({1}))])]
    between = kept.get("between") or []
    words = [
        "People judged pairs of responses without knowing which policy wrote which; a tie is half a win. "
        + (KAPPA if between else "")
    ]
    tables = [_with_scores(readers)] if any(of.get("agreement") for of in readers.values()) else []
    return Section("people", "People", words, [*tables, *([_with_each_other(between)] if between else [])], figures)


def _kept(sources: Sources) -> dict[str, Any]:
    """The file of the run's verdicts; empty where there is none, or none that can be read."""
    try:
        found = json.loads(sources.verdicts.read_text(encoding="utf-8")) if sources.verdicts is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _with_scores(readers: Mapping[str, Mapping[str, Any]]) -> Table:
    scores = dict.fromkeys(score for of in readers.values() for score in of.get("agreement") or {})
    rows = [
        (score_name(score), *(percents((of.get("agreement") or {}).get(score)) for of in readers.values()))
        for score in scores
    ]
    return Table("How often a score prefers what a person did", ("Score", *readers), rows)


def _with_each_other(between: list[Mapping[str, Any]]) -> Table:
    kappas = [{"value": of["kappa"], "low": of.get("kappa_low"), "high": of.get("kappa_high")} for of in between]
    rows = [
        (" and ".join(of["readers"]), percent(of["agreement"]), interval(kappa, 2), number(of["rows"], 0))
        for of, kappa in zip(between, kappas, strict=True)
    ]
    return Table("Readers of the same pairs", ("Readers", "agree", "kappa", "prompts"), rows)
