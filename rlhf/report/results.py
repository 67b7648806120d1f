"""What the evaluation found: all metrics, comparisons, people's verdicts, distributions, lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.metrics.labels import LABELS, label
from rlhf.report import charts
from rlhf.report.charts import Dot, Spread
from rlhf.report.sources import Figure, Folded, Section, Sources, Table
from rlhf.report.words import (
    interval,
    number,
    p_value,
    percent,
    percents,
    policy,
    score_name,
    significant,
    value_of,
)

NAN = math.nan
# Beside the scores, what stands open; the rest is folded away.
HEADLINES = (
    "kl",
    "perplexity",
    "rougeL",
    "bleu",
    "chrf",
    "meteor",
    "length_tokens",
    "length_exact",
    "eos_rate",
    "distinct2",
)
LENGTHS = ("length_tokens", "length_words")
PERCENTILES = ("5", "25", "50", "75", "95")


def metrics(sources: Sources) -> Section | None:
    """Every metric of every policy."""
    report = sources.evaluation
    found: Mapping[str, Mapping[str, Any]] = report.get("metrics") or {}
    if not found:
        return None
    judged = list(report.get("judged", []))
    known = dict.fromkeys(name for of in found.values() for name in of)
    order = [name for name in [*judged, *(name for name in LABELS if name not in judged)] if name in known]
    order += [name for name in known if name not in order]
    trained_on = report.get("trained_on") or []
    rows = {
        name: (_named(name, trained_on), *(_cell(of.get(name), name, report.get("prompts")) for of in found.values()))
        for name in order
    }
    first = [name for name in order if name in judged or name in HEADLINES]
    reference = policy(str(report.get("kl_reference", "sft")))
    about = Table(
        "What these metrics are",
        ("Metric", "What it is"),
        [(score_name(n), label(n).about) for n in order],
        frozenset({1}),
    )
    words = [f"KL is to {reference}; “reference” are the responses of the data."] if "reference" in found else []
    absent = "" if any(name.startswith("rouge") for name in order) else (
        "The prompts have no references, so that there are no metrics against them (ROUGE, BLEU, METEOR, chrF)."
    )  # fmt: skip
    caption, head = "Mean, or value of the corpus, with its interval", ("Metric", *found)
    table = Table(caption, head, [rows[name] for name in first])
    rest = Table(caption, head, [rows[name] for name in order if name not in first])
    words += [absent] if absent else []
    folded = [Folded(f"{len(rest.rows)} more metrics", [rest])] if rest.rows else []
    return Section("metrics", "Metrics", words, [table], folded=[*folded, Folded("What these metrics are", [about])])


def _named(name: str, trained_on: Sequence[str]) -> str:
    return f"{score_name(name)} (trained on)" if name in trained_on else score_name(name)


def _cell(estimate: Mapping[str, Any] | None, metric: str, prompts: Any) -> str:
    if estimate is None or estimate.get("value") is None:
        return "\N{EN DASH}"
    few = f" (n = {estimate['n']})" if estimate.get("n") not in (prompts, None) else ""
    return interval(estimate, label(metric).digits).replace(" [", "\n[") + few


def comparisons(sources: Sources) -> Section | None:
    """Each comparison: win rates in a chart, differences in a table."""
    found = sources.evaluation.get("comparisons") or []
    found = [one for one in found if one.get("scores") or one.get("judges")]
    if not found:
        return None
    trained_on = sources.evaluation.get("trained_on") or []
    figures = [_wins(one, trained_on) for one in found]
    tables = [_differences(found[0], trained_on)] if found[0].get("scores") else []
    folded = [Folded(f"{pair_of(one)}: all differences", _all_differences(one, trained_on)) for one in found]
    folded += [Folded("How sure the comparing judges are", [judges])] if (judges := _judges(found)) else []
    words = [
        "How often the first one’s response scores above the other’s to the same prompt; a tie is half a win. "
        "“At equal length” is what the win rate would be if both were equally long.",
    ]
    return Section("comparisons", "Comparisons", words, tables, figures, folded)


def pair_of(one: Mapping[str, Any]) -> str:
    """Who is compared with whom."""
    return " against ".join(policy(str(one[who])) for who in ("candidate", "baseline"))


def _wins(one: Mapping[str, Any], trained_on: Sequence[str]) -> Figure:
    scores, judges = one.get("scores") or {}, one.get("judges") or {}
    dots, rows = [], []
    for name, of in [*scores.items(), *judges.items()]:
        fair = of.get("win_rate_length_controlled")
        shown = score_name(name) if name in scores else name
        look = "proxy" if name in trained_on else "one" if name in scores else "three"
        second = three(fair) if fair and fair.get("value") is not None else None
        dots.append(Dot(shown, look, three(of.get("win_rate")), percents(of.get("win_rate")), second))
        shares = (percent(of.get(kind)) for kind in ("wins", "ties", "losses"))
        rows.append((_named(name, trained_on) if name in scores else name, percents(of.get("win_rate")), *shares,
                     percents(fair), p_value(value_of(of.get("p")))))  # fmt: skip
    title = pair_of(one)
    head = ("By", "win rate", "wins", "ties", "losses", "at equal length", "p")
    legend = [("one", "by a score it was not trained on")]
    legend += [("proxy", "by what it was trained on")] if any(name in trained_on for name in scores) else []
    legend += [("three", "by a comparing judge")] if judges else []
    legend += [("hollow", "at equal length")] if any(dot.second for dot in dots) else []
    picture = charts.dots(dots, title, "win rate", middle=0.5, limits=(0.0, 1.0))
    return Figure(title, picture, [Table(title, head, rows)], legend, keys="dot")


def _judges(found: Sequence[Mapping[str, Any]]) -> Table | None:
    """How much comparing judges agree with themselves in the other order; None without judges."""
    rows = [
        (name, pair_of(one), percent(of.get("consistency")), percent(of.get("shown_first_share")))
        for one in found
        for name, of in (one.get("judges") or {}).items()
        if "consistency" in of
    ]
    head = ("Judge", "of", "same verdict in both orders", "prefers the response shown first")
    return Table("Each pair is judged in both orders", head, rows, frozenset({1})) if rows else None


def _all_differences(one: Mapping[str, Any], trained_on: Sequence[str]) -> list[Table]:
    tables = [_differences(one, trained_on)] if one.get("scores") else []
    return [*tables, _metric_differences(one)] if one.get("metrics") else tables


def _differences(one: Mapping[str, Any], trained_on: Sequence[str]) -> Table:
    rows = [
        (
            _named(name, trained_on),
            interval(of.get("difference"), label(name).digits, sign=True),
            p_value(value_of(of.get("p"))),
            number(value_of(of.get("effect")), 2, sign=True),
            percents(of.get("win_rate")),
            percents(of.get("win_rate_length_controlled")),
        )
        for name, of in one["scores"].items()
    ]
    head = ("Score", "difference", "p", "effect size", "win rate", "at equal length")
    return Table(f"{pair_of(one)}, prompt by prompt", head, rows)


def _metric_differences(one: Mapping[str, Any]) -> Table:
    rows = [
        (
            score_name(name),
            interval(of.get("difference"), label(name).digits, sign=True),
            p_value(value_of(of.get("p"))),
            number(value_of(of.get("effect")), 2, sign=True),
        )
        for name, of in one["metrics"].items()
    ]
    return Table(f"{pair_of(one)}: other metrics", ("Metric", "difference", "p", "effect size"), rows)


def three(estimate: Mapping[str, Any] | None) -> tuple[float, float, float]:
    """Value and bounds of an estimate, NaN where there is none."""
    value, low, high = (NAN if (v := (estimate or {}).get(k)) is None else float(v) for k in ("value", "low", "high"))
    return value, low, high


def distributions(sources: Sources) -> Section | None:
    """Each score as a box plot and as histograms."""
    report = sources.evaluation
    found = {name: of for name, of in (report.get("distributions") or {}).items() if name not in LENGTHS}
    figures = [figure for name, of in found.items() for figure in spread(name, of)]
    if not figures:
        return None
    words = [
        "Histograms, and below each a box from quartile to quartile with a line at the median, whiskers at 5 and 95 %, "
        "a diamond at the mean."
    ]
    if any("training" in of.get("counts", {}) for of in found.values()):
        words.append("“training” are both texts of preference pairs that the reward model was trained on.")
    return Section("scores", "Distribution of scores", words, figures=figures)


def lengths(sources: Sources) -> Section | None:
    """How long the responses are, and how many end by themselves."""
    report = sources.evaluation
    found = {name: of for name, of in (report.get("distributions") or {}).items() if name in LENGTHS}
    figures = [figure for name, of in found.items() for figure in spread(name, of)]
    names = [n for n in (*LENGTHS, "eos_rate") if any(n in of for of in (report.get("metrics") or {}).values())]
    if not figures and not names:
        return None
    policies = report.get("metrics") or {}
    rows = [(score_name(n), *(_cell(of.get(n), n, report.get("prompts")) for of in policies.values())) for n in names]
    tables = [Table("Lengths, with intervals of the mean", ("", *policies), rows)] if rows else []
    return Section("lengths", "Length of responses", (), tables, figures)


def spread(name: str, of: Mapping[str, Any], title: str | None = None) -> list[Figure]:
    """The chart of one distribution of report.json; none where no text has a value."""
    title, digits = title or score_name(name), label(name).digits
    percentiles, means = of.get("percentiles") or {}, of.get("means") or {}
    groups = {
        who: Spread(*(float(v) for v in [*(values[p] for p in PERCENTILES), means[who]]))
        for who, values in percentiles.items()
    }
    if not groups:
        return []
    rows = [(who, *(number(v, digits) for v in values)) for who, values in groups.items()]
    head = ("Texts of", *(f"{p} %" for p in PERCENTILES), "mean")
    edges, counts = of["edges"], of["counts"]
    bins = [
        (f"{significant(edges[i])} to {significant(edges[i + 1])}", *(f"{c[i]:,}" for c in counts.values()))
        for i in range(len(edges) - 1)
    ]
    tables = [Table("Percentiles", head, rows), Table("Texts in each bin", ("Bin", *counts), bins)]
    return [Figure(title, charts.spreads(edges, counts, groups, title, score_name(name).lower()), tables)]
