"""The figures of a run that a person looks at first, as texts: for the terminal and for Prefect's UI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rlhf.labels import LABELS

POLICIES = ("base", "sft", "ppo", "reference")
# The metrics of the table, in its order, after the scorers of the configuration; others are in the report.
ROWS = {
    "reward": "reward",
    "rougeL": "ROUGE-L",
    "rouge1": "ROUGE-1",
    "bleu": "BLEU",
    "meteor": "METEOR",
    "length_tokens": "length (tokens)",
    "kl": "KL to {reference} (nats)",
}


class Table(NamedTuple):
    """Head and rows of a table of texts."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def figures(metrics: Mapping[str, float], separator: str = " ") -> Table:
    """What the evaluation found, a column for each policy; no rows where there was none.

    Args:
        metrics: final metrics by name, ``evaluate/ppo/reward``, with ``_low`` and ``_high`` where there are bounds.
        separator: stands between a figure and its interval.
    """
    policies = _evaluated(metrics)
    reference = "SFT" if "sft" in policies else "BASE"
    measured = {name: None for policy in policies for name in _measured(metrics, policy)}
    scorers = {name: f"{name.replace('_', ' ')} score" for name in measured if name not in LABELS}
    rows = [
        (
            label.format(reference=reference),
            *(value(metrics, f"evaluate/{policy}/{metric}", separator) for policy in policies),
        )
        for metric, label in (scorers | ROWS).items()
        if metric in measured
    ]
    return Table(("held-out prompts", *policies), rows)


def _evaluated(metrics: Mapping[str, float]) -> list[str]:
    """The policies that were evaluated, and the references where there were some."""
    return [name for name in POLICIES if any(key.startswith(f"evaluate/{name}/") for key in metrics)]


def _measured(metrics: Mapping[str, float], policy: str) -> list[str]:
    """What was measured of a policy, without the bounds of intervals."""
    names = [key.removeprefix(f"evaluate/{policy}/") for key in metrics if key.startswith(f"evaluate/{policy}/")]
    bounds = {f"{name}{end}" for name in names for end in ("_low", "_high")}
    return [name for name in names if name not in bounds]


def sentences(metrics: Mapping[str, float]) -> list[str]:
    """How good the reward model is, and how often the last policy wins, a line each."""
    lines = []
    if "reward/test_accuracy" in metrics:
        lines.append(f"Reward model: {value(metrics, 'reward/test_accuracy')} of held-out pairs ordered rightly")
    policies = [name.upper() for name in _evaluated(metrics) if name != "reference"]
    for kind, other in (("win_rate", policies[-2:-1]), ("win_rate_against_references", ["the references"])):
        wins = (key for key in metrics if key.startswith(f"evaluate/{kind}/") and not key.endswith(("_low", "_high")))
        for key in sorted(wins):
            names = f"{policies[-1]} against {other[0]}"
            lines.append(f"{names}, win rate by {key.rpartition('/')[2]}: {value(metrics, key)}")
    return lines


def value(metrics: Mapping[str, float], key: str, separator: str = " ") -> str:
    """A figure, and its interval where there is one; empty where it is unknown."""
    if key not in metrics:
        return ""
    text = _number(metrics[key], 3)
    if f"{key}_low" in metrics:
        text += f"{separator}[{_number(metrics[f'{key}_low'], 2)}, {_number(metrics[f'{key}_high'], 2)}]"
    return text


def duration(seconds: float) -> str:
    """Seconds as ``1 m 05 s``."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} m {int(seconds) % 60:02d} s"


def size(count: int) -> str:
    """Bytes as ``1.2 MB``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _number(value: float, decimals: int) -> str:
    return f"{value:.{decimals if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"
