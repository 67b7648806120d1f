"""The figures of a run that a person looks at first, as texts: for the terminal and for Prefect's UI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rlhf.metrics.labels import COMPONENT, LABELS

POLICIES = ("base", "sft", "ppo", "reference")
BESIDE = ("_low", "_high", "_stderr")  # ends the names of what stands beside a figure
SURE = 0.05  # a p-value below this is no accident
# The metrics of the table, in its order, after the scorers of the configuration; others are in the report.
ROWS = {
    "held_out": "held-out reward",
    "reward": "reward",
    "rougeL": "ROUGE-L",
    "rouge1": "ROUGE-1",
    "bleu": "BLEU",
    "meteor": "METEOR",
    "perplexity": "perplexity",
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
    scorers = {
        name: f"{name.replace('_', ' ')} score"
        for name in measured
        if name not in LABELS and not name.startswith(COMPONENT)
    }
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
    bounds = {f"{name}{end}" for name in names for end in BESIDE}
    return [name for name in names if name not in bounds]


def sentences(metrics: Mapping[str, float]) -> list[str]:
    """How good the reward models are, whether the last policy is better, and whether it is over-optimised."""
    lines = [
        f"{name}: {value(metrics, key)} of held-out pairs ordered rightly"
        for name, key in (
            ("Reward model", "reward/test_accuracy"),
            ("Held-out reward model", "reward/held_out/test_accuracy"),
        )
        if key in metrics
    ]
    policies = [name.upper() for name in _evaluated(metrics) if name != "reference"]
    for kind, other in (("win_rate", policies[-2:-1]), ("win_rate_against_references", ["the references"])):
        lines += [
            f"{policies[-1]} against {other[0]} by {_score(name)}: {_wins(metrics, kind, name)}"
            for name in _judging(metrics, kind)
        ]
    fell = [name for name in _names(metrics, "ppo/overoptimised/") if metrics[f"ppo/overoptimised/{name}"]]
    if fell:
        lines.append(
            f"Over-optimised: the reward of PPO rose while {' and '.join(map(_score, fell))} fell; "
            "see the report, and raise ppo.kl_coef or make fewer updates"
        )
    return lines


def _names(metrics: Mapping[str, float], prefix: str) -> list[str]:
    found = {key.removeprefix(prefix) for key in metrics if key.startswith(prefix)}
    return sorted(found - {f"{name}{end}" for name in found for end in BESIDE})


def _judging(metrics: Mapping[str, float], kind: str) -> list[str]:
    """The scores and judges that have win rates; last the reward, which training raises whatever else it does."""
    return sorted(_names(metrics, f"evaluate/{kind}/"), key=lambda name: (name == "reward", name != "held_out", name))


def _score(name: str) -> str:
    return {"held_out": "held-out reward"}.get(name, name.replace("_", " "))


def _wins(metrics: Mapping[str, float], kind: str, name: str) -> str:
    """A win rate; of the main comparison also what it means, and what it would be at equal length."""
    rate = f"win rate {value(metrics, f'evaluate/{kind}/{name}')}"
    if kind != "win_rate":
        return rate
    even = f"evaluate/win_rate_length_controlled/{name}"
    words = [_verdict(metrics, name), rate, f"{_number(metrics[even], 2)} at equal length" if even in metrics else ""]
    return ", ".join(filter(None, words))


def _verdict(metrics: Mapping[str, float], name: str) -> str:
    """What the paired test of scores says, or the interval of a judge's win rate; nothing where there is neither."""
    p, difference = metrics.get(f"evaluate/p_value/{name}"), metrics.get(f"evaluate/difference/{name}")
    if p is not None and difference is not None:
        better, worse = (p < SURE and sign * difference > 0 for sign in (1, -1))
    elif (low := metrics.get(f"evaluate/win_rate/{name}_low")) is not None:
        better, worse = low > 0.5, metrics[f"evaluate/win_rate/{name}_high"] < 0.5
    else:
        return ""
    return "surely better" if better else "surely worse" if worse else "no clear difference"


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


def _number(value: float, decimals: int) -> str:
    if abs(value) >= 1e5:
        return f"{value:.1e}"
    return f"{value:.{decimals if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"
