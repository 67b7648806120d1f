"""``rlhf diff``: what differs between two runs, and whether it made a difference."""

from __future__ import annotations

import argparse
import json
import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from flows.commands import options as given
from flows.commands.summary import print_table
from rlhf.champions import CHAMPION, find_run
from rlhf.metrics import LABELS, label
from rlhf.runs import RunRecord, headlines
from rlhf.store import Store, home_directory

if TYPE_CHECKING:
    from rlhf.runs import Change, Compared
    from rlhf.statistics import Estimate

ABOUT = "Say what differs between two runs: configuration, data, code, versions, and figures beyond noise."
RUN = f"run id, pipeline (its last finished run), or {CHAMPION}PIPELINE"
KINDS = {
    "config": "settings",
    "data": "data",
    "models": "models",
    "code": "code",
    "libraries": "libraries",
    "device": "computed on",
    "no number": "settings that change no number",
}
POLICIES = ("ppo", "sft", "base")
WIN_RATES = {
    "evaluate/win_rate/": "win rate by {}",
    "evaluate/win_rate_length_controlled/": "win rate by {}, at equal length",
    "evaluate/win_rate_against_base/": "win rate by {}, against base",
    "evaluate/win_rate_against_references/": "win rate by {}, against references",
}
OTHERS = {
    "reward/test_accuracy": "accuracy of the reward model",
    "reward/held_out/test_accuracy": "accuracy of the held-out one",
    "ppo/overoptimised": "over-optimised",
}
MAIN = ("reward", "held_out", "kl", "rougeL", "length_tokens", "perplexity")  # besides scorers
WORDS = 30  # columns of a terminal: of a figure's name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("a", metavar="A", help=RUN)
    parser.add_argument("b", metavar="B", help="the same, of the other run")
    parser.add_argument("--all", action="store_true", help="show figures within noise that are not the main ones, too")
    given.add_json(parser)
    given.add_home(parser)


def command(options: argparse.Namespace, console: Console) -> None:
    """Compare two runs."""
    from rlhf.runs import comparison

    store = Store(home_directory(options.home))
    a, b = (comparison.read(find_run(store.home, name), store) for name in (options.a, options.b))
    if options.json:
        print(json.dumps(comparison.as_json(a, b), indent=1))
        return
    for letter, side in (("A", a), ("B", b)):
        console.print(f"{letter}  {_named(side.record)}", highlight=False, markup=False, soft_wrap=True)
    became: dict[str, list[str]] = {}
    for stage, what in comparison.stages(a, b).items():
        became.setdefault(what, []).append(stage)
    words = {"same": "the same artifact", "same result": "made anew with the same result", "different": "differs"}
    print_table(("stages", ""), [(", ".join(names), words.get(what, what)) for what, names in became.items()], console)
    _print_changes(comparison.changes(a, b), console)
    _print_figures(comparison.compare(a, b), options.all, console)


def _named(record: RunRecord) -> str:
    began = time.strftime("%d %b %Y %H:%M", time.localtime(record.started))
    return f"{record.id}  {record.pipeline}, {began}, {record.status}"


def _print_changes(changes: Sequence[Change], console: Console) -> None:
    """What differs, by kind; a change that concerns several stages is one line."""
    rows: list[tuple[str, ...]] = []
    for kind, words in KINDS.items():
        found = [change for change in changes if change.kind == kind]
        for number, change in enumerate(found):
            rows.append((words if number == 0 else "", _change(change), ", ".join(change.stages)))
    if rows:
        print_table(("what differs", "", "concerns"), rows, console)
    else:
        console.print("Nothing differs that a result depends on.\n")


def _change(change: Change) -> str:
    if change.kind == "code":
        where = "only in B" if change.a is None else "only in A" if change.b is None else "changed"
        return f"{change.name} {where}"
    name = "" if change.kind == "device" else f"{change.name}: "
    return f"{name}{as_written(change.a)} -> {as_written(change.b)}"


def as_written(value: Any) -> str:
    """A setting as a person writes it."""
    return "(not there)" if value is None else value if isinstance(value, str) else json.dumps(value)


def _print_figures(figures: Sequence[Compared], everything: bool, console: Console) -> None:
    """The figures of the last policy, win rates and the reward models, with a verdict on each."""
    by_name = {figure.name: figure for figure in figures}
    policy = next((name for name in POLICIES if any(key.startswith(f"evaluate/{name}/") for key in by_name)), "")
    words = _shown(by_name, policy)
    shown = [name for name in words if everything or by_name[name].noise is False or _is_main(name)]
    if not shown:
        console.print("There is no figure that both runs have.")
        return
    rows = [
        (
            textwrap.fill(words[name], WORDS),
            *(_figure(estimate) for estimate in (by_name[name].a, by_name[name].b, by_name[name].difference)),
            _verdict(by_name[name]),
        )
        for name in shown
    ]
    print_table((policy.upper() or "figures", "A", "B", "B - A", "more than noise?"), rows, console)
    tested = [figure for figure in figures if figure.test == "prompt by prompt"]
    if tested:
        prompts = max(figure.difference.n for figure in tested)
        console.print(f"* prompt by prompt, on {prompts} prompts that both answered; the others by their intervals.")
    if len(shown) < len(words):
        console.print(f"{len(words) - len(shown)} further figures differ by no more than noise; --all shows them.")
    console.print(
        "It is about these two policies on other prompts; another seed gives other policies. Of 20 figures without a "
        "true difference about one is called one.",
        style="dim",
    )


def _shown(figures: Mapping[str, Compared], policy: str) -> dict[str, str]:
    """The figures that people look at, if they can be tested, or would be but for the judge; with what to call them."""
    from rlhf.runs import NO_INTERVAL

    prefix = f"evaluate/{policy}/"
    found = {name: win_rate(name) for start in WIN_RATES for name in figures if name.startswith(start)}
    found |= {name: label(name.removeprefix(prefix)).name for name in figures if policy and name.startswith(prefix)}
    found |= {name: words for name, words in OTHERS.items() if name in figures}
    return {name: words for name, words in found.items() if name in OTHERS or figures[name].note != NO_INTERVAL}


def _is_main(name: str) -> bool:
    """Whether a figure is shown even if it is within noise: win rates, scores, and the main ones of ``MAIN``."""
    if win_rate(name):
        return name.startswith(tuple(WIN_RATES)[:2])
    metric = name.rpartition("/")[2]
    return name in OTHERS or metric in MAIN or metric not in LABELS


def win_rate(name: str) -> str:
    """What a win rate is called; empty for another figure."""
    for start, words in WIN_RATES.items():
        if name.startswith(start):
            score = name.removeprefix(start)
            return words.format(label(score).name.lower() if score in LABELS else score.replace("_", " "))
    return ""


def _figure(estimate: Estimate) -> str:
    metrics = {"x": estimate.value, "x_low": estimate.low, "x_high": estimate.high}
    return headlines.value({name: value for name, value in metrics.items() if not math.isnan(value)}, "x", "\n")


def _verdict(figure: Compared) -> str:
    if figure.noise is None:
        return f"not tested: {figure.note}" if figure.name not in OTHERS else ""
    star = "*" if figure.test == "prompt by prompt" else ""
    p = "" if math.isnan(figure.p) else f" p {figure.p:.3f}" if figure.p >= 0.001 else " p < 0.001"
    return f"{'no' if figure.noise else 'yes'}{star}{p}"
