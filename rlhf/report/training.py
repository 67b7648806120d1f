"""How the run made its models: the data, the training curves, the reward model, sizes and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.report import charts
from rlhf.report.charts import Curve
from rlhf.report.results import spread
from rlhf.report.sources import Figure, Folded, Section, Sources, Table
from rlhf.report.words import DASH, energy, interval, number, percent, score_name, significant
from rlhf.runs import headlines
from rlhf.store import disk
from rlhf.tracking.tracker import Entry

SPLITS = {"train": "one", "validation": "two", "test": "three"}
POINTS, ROWS = 400, 60  # most points of a curve, most rows of the table behind it
LENGTHS = ("mean", "p50", "p95", "max")

# The curves that one looks at first: title, and the metric of each line with what it is called; others are folded away.
FIRST: dict[str, Sequence[tuple[str, Mapping[str, str]]]] = {
    "sft": [
        ("Loss", {"loss": "training", "validation_loss": "validation"}),
        ("Gradient norm", {"grad_norm": "before clipping"}),
    ],
    "reward": [
        ("Loss", {"loss": "training", "validation_loss": "validation"}),
        ("Pairs ordered rightly", {"accuracy": "training", "validation_accuracy": "validation"}),
        ("Gradient norm", {"grad_norm": "before clipping"}),
    ],
    "ppo": [
        ("Score", {"score_mean": "training prompts", "eval/score": "held-out prompts"}),
        ("KL to the reference, nats", {"kl": "training prompts", "eval/kl": "held-out prompts"}),
        (
            "Response length, tokens",
            {"response_length_mean": "training prompts", "eval/response_length_mean": "held-out prompts"},
        ),
        ("Entropy, nats a token", {"entropy": "of the policy"}),
        ("Loss of the value model", {"value_loss": "training"}),
        ("Ended by itself", {"eos_rate": "training prompts", "eval/eos_rate": "held-out prompts"}),
    ],
}  # fmt: skip


def data(sources: Sources) -> Section | None:
    """The funnel of the data: rows read, lost and why, and the splits of what stayed."""
    report = sources.json("prepare", "report.json")
    kinds = {name: of for name, of in report.items() if isinstance(of, dict) and "kept" in of}
    if not kinds:
        return None
    reasons = dict.fromkeys(why for of in kinds.values() for why, count in (of.get("lost") or {}).items() if count)
    bars = {
        f"{name}: {of['kept']:,} of {of.get('rows', 0):,} rows": [
            *((look, float((of.get("splits") or {}).get(split, 0))) for split, look in SPLITS.items()),
            ("lost", float(sum((of.get("lost") or {}).values()))),
        ]
        for name, of in kinds.items()
    }
    rows = [
        (
            name,
            f"{of.get('rows', 0):,}",
            *(f"{(of.get('lost') or {}).get(why, 0):,}" for why in reasons),
            f"{of['kept']:,}",
            *(f"{(of.get('splits') or {}).get(split, 0):,}" for split in SPLITS),
        )
        for name, of in kinds.items()
    ]
    head = ("Kind", "rows read", *(f"lost: {why.replace('_', ' ')}" for why in reasons), "kept", *SPLITS)
    table = Table("Rows read, lost and kept", head, rows)
    legend = [*((look, split) for split, look in SPLITS.items()), ("lost", "lost")]
    figure = Figure("Rows", charts.bars(bars, "Rows", "rows"), (), legend, keys="fill")
    tokens = [
        (f"{name}: {part}", *(number(of.get(p), 0) for p in LENGTHS))
        for name, kind in kinds.items()
        for part, of in (kind.get("tokens") or {}).items()
    ]
    folded = [Folded("Lengths in tokens", [Table("Lengths in tokens", ("Texts", *LENGTHS), tokens)])] if tokens else []
    words = [] if reasons else ["No row was lost."]
    return Section("data", "Data", words, [table], [figure], folded)


def curves(sources: Sources) -> list[Section]:
    """The training curves of each stage that has some."""
    titles = {"sft": "Supervised fine-tuning", "reward": "Reward model: training", "ppo": "PPO"}
    return [
        section
        for stage in sources.manifests
        if (entries := sources.journal(stage))
        for section in [_stage_curves(stage, titles.get(stage, stage.capitalize()), entries)]
    ]


def _stage_curves(stage: str, title: str, entries: Sequence[Entry]) -> Section:
    series = _series(stage, entries)
    shown: set[str] = set()
    figures: list[Figure] = []
    for name, wanted in FIRST.get(stage, []):
        lines = {said: series[metric] for metric, said in wanted.items() if metric in series}
        if lines:
            shown.update(wanted)
            figures.append(_curve_figure(name, lines, stage))
    judges = {name: points for name, points in series.items() if name.startswith("eval/judge/")}
    means = {name: points for name, points in judges.items() if not name.endswith("_stderr")}
    if means:
        shown.update(judges)
        for name, points in means.items():
            judge = score_name(name.removeprefix("eval/judge/")).lower()
            figures.append(_curve_figure(f"Judge: {judge}", {"held-out prompts": points}, stage))
    rest = [_curve_figure(name, {name: points}, stage) for name, points in series.items() if name not in shown]
    folded = [Folded(f"{len(rest)} more curve{'s'[: len(rest) > 1]}", figures=rest)] if rest else []
    return Section(f"curves-{stage}", title, (), (), figures, folded)


def _series(stage: str, entries: Sequence[Entry]) -> dict[str, list[tuple[int, float]]]:
    """The points of each metric, without the stage in its name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in entries:
        for name, value in entry.values.items():
            found.setdefault(name.removeprefix(f"{stage}/"), []).append((entry.step, value))
    return found


def _curve_figure(title: str, named: Mapping[str, Sequence[tuple[int, float]]], stage: str) -> Figure:
    looks = ("one", "two", "three")
    thinned = {name: thin(points, POINTS) for name, points in named.items()}
    lines = [
        Curve(name, look, [float(step) for step, _ in points], [value for _, value in points])
        for look, (name, points) in zip(looks, thinned.items(), strict=False)
    ]
    dots = max(len(points) for points in thinned.values()) <= 12
    step = "update" if stage == "ppo" else "optimizer step"
    picture = charts.lines(lines, title, step, "", dots=dots)
    by_step: dict[int, dict[str, float]] = {}
    for name, points in named.items():
        for at, value in thin(points, ROWS):
            by_step.setdefault(at, {})[name] = value
    rows = [(str(at), *(significant(values.get(name)) for name in named)) for at, values in sorted(by_step.items())]
    most = max(len(points) for points in named.values())
    caption = title if most <= ROWS else f"{title}: {ROWS} of {most:,} points"
    note = f"{POINTS} of {most:,} points are drawn." if most > POINTS else ""
    legend = [(line.look, line.name) for line in lines] if len(lines) > 1 else []
    return Figure(title, picture, [Table(caption, (step, *named), rows)], legend, note)


def thin(points: Sequence[tuple[int, float]], most: int) -> Sequence[tuple[int, float]]:
    """At most so many of the points, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def reward_model(sources: Sources) -> Section | None:
    """How the reward model orders held-out pairs, and whether its confidence is right."""
    found = sources.json("reward", "calibration.json")
    pairs = found.get("pairs") or {}
    scores = (sources.evaluation.get("pairs") or {}).get("scores")
    finals = sources.manifests["reward"].metrics if "reward" in sources.manifests else {}
    figures, tables, words = [], [], []
    if pairs.get("accuracy"):
        rows = [("All held-out pairs", interval(pairs["accuracy"]), f"{pairs.get('pairs', 0):,}")]
        for of in pairs.get("by_length") or []:
            tokens = f"{_signed(of['tokens_from'])} to {_signed(of['tokens_to'])} tokens"
            rows.append((f"Chosen is {of['chosen'].replace('_', ' ')} ({tokens})", interval(of), f"{of['n']:,}"))
        if "reward/held_out/test_accuracy" in finals:
            estimate = {end: finals.get(f"reward/held_out/test_accuracy{s}") for end, s in
                        (("value", ""), ("low", "_low"), ("high", "_high"))}  # fmt: skip
            rows.append(("Held-out reward model: all pairs", interval(estimate), f"{pairs.get('pairs', 0):,}"))
        tables.append(Table("Pairs ordered rightly", ("Pairs", "share", "n"), rows))
    calibration = pairs.get("calibration") or {}
    if calibration.get("bins"):
        words.append(
            f"Its confidence is off by {percent(calibration['error'], 1)} on average; if it were right, so few pairs "
            f"would show {percent(calibration['error_if_calibrated'], 1)} by chance."
        )
        figures.append(_reliability(calibration["bins"]))
    if scores:
        figures += spread("reward", scores, "Scores of held-out pairs")
    if not (figures or tables):
        return None
    return Section("reward-model", "Reward model: calibration", words, tables, figures)


def _signed(count: int) -> str:
    return number(float(count), 0, sign=True)


def _reliability(bins: Sequence[Mapping[str, float]]) -> Figure:
    x, y = "probability that the model gives to one side", "share with this side chosen"
    rows = [
        (percent(of["confidence"], 1), percent(of["right"], 1), f"{percent(of['low'], 1)} to {percent(of['high'], 1)}",
         f"{of['pairs']:,}")
        for of in bins
    ]  # fmt: skip
    table = Table("Reliability, by bins of equally many pairs", ("Confidence", "came true", "interval", "pairs"), rows)
    legend = [("one", "share that came true, with its interval"), ("middle", "where confidence is right")]
    return Figure("Is its confidence right?", charts.reliability(bins, "Reliability", x, y), [table], legend)


def models(sources: Sources) -> Section | None:
    """How large the models are, and how many of their numbers learnt."""
    found = dict(sources.evaluation.get("models") or {})
    learnt = {
        stage: manifest.metrics[name]
        for stage, manifest in sources.manifests.items()
        if (name := f"{stage}/trainable_parameters") in manifest.metrics
    }
    for stage, count in learnt.items():
        found[stage] = {"trainable": count} | found.get(stage, {})
    if "held_out" in found and "reward" in learnt:  # trained as the reward model is, but for the seed
        found["held_out"] = {"trainable": learnt["reward"]} | found["held_out"]
    if not found:
        return None
    rows = [
        (name, number(of.get("parameters"), 0), number(of.get("trainable"), 0), number(of.get("size_mb"), 2))
        for name, of in found.items()
    ]
    head = ("Model", "parameters", "of these learnt", "MB")
    return Section("models", "Models", (), [Table("As they were evaluated; MB are 10⁶ bytes of memory", head, rows)])


def cost(sources: Sources) -> Section | None:
    """What each stage took when it was computed."""
    if not sources.manifests:
        return None
    costs = {stage: dict(getattr(manifest, "cost", None) or {}) for stage, manifest in sources.manifests.items()}
    known = [name for name in _COSTS if any(name in of for of in costs.values())]
    rows, spent = [], 0.0
    for stage, manifest in sources.manifests.items():
        cached = bool(sources.record.stages.get(stage, {}).get("cached"))
        spent += 0.0 if cached else manifest.seconds
        cells = [_COSTS[name][1](costs[stage][name]) if name in costs[stage] else DASH for name in known]
        rows.append((stage, "cached" if cached else "computed", headlines.duration(manifest.seconds), *cells,
                     disk.size(manifest.size), manifest.device or DASH))  # fmt: skip
    total = sum(manifest.seconds for manifest in sources.manifests.values())
    words = [
        f"All stages together took {headlines.duration(total)}; this run computed for {headlines.duration(spent)}."
    ]
    joules = [of["energy_joules"] for of in costs.values() if "energy_joules" in of]
    words += [f"Energy: {energy(sum(joules))}, as far as the device tells it."] if joules else []
    head = ("Stage", "in this run", "time", *(_COSTS[name][0] for name in known), "on disk", "device")
    table = Table("What each stage took when it was computed", head, rows, frozenset({1, len(head) - 1}))
    bars = {f"{stage}: {headlines.duration(m.seconds)}": [("one", m.seconds)] for stage, m in sources.manifests.items()}
    figure = Figure("Time", charts.bars(bars, "Time", "seconds"), ())
    return Section("cost", "Cost", words, [table], [figure])


def _bytes(count: float) -> str:
    return disk.size(int(count)) if math.isfinite(count) else DASH


_COSTS: dict[str, Any] = {
    "peak_memory_bytes": ("peak memory", _bytes),
    "gpu_peak_memory_bytes": ("peak GPU memory", _bytes),
    "energy_joules": ("energy", energy),
}
