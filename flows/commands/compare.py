"""``rlhf diff`` and ``rlhf compare``: what differs between runs, and whether it made a difference."""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from rich.console import Console

from flows.commands.summary import print_table
from rlhf.champions import CHAMPION, find_run
from rlhf.errors import ConfigError, did_you_mean
from rlhf.metrics import LABELS, label
from rlhf.runs import RunRecord, headlines, read_runs
from rlhf.store import Store, home_directory

if TYPE_CHECKING:
    from rlhf.runs import Change, Compared, Row
    from rlhf.statistics import Estimate

ABOUT_DIFF = "Say what differs between two runs: configuration, data, code, versions, and figures beyond noise."
ABOUT_COMPARE = "Show runs side by side: the settings in which they differ, and what they measured."
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
# What a table of runs shows first, as far as it is there and fits.
HEADLINES = (
    "evaluate/win_rate/held_out", "evaluate/win_rate/gold", "evaluate/ppo/kl", "evaluate/ppo/reward",
    "evaluate/ppo/rougeL", "evaluate/win_rate_length_controlled/held_out", "ppo/overoptimised",
    "evaluate/win_rate/reward", "evaluate/sft/rougeL", "reward/test_accuracy",
)  # fmt: skip
MAIN = ("reward", "held_out", "kl", "rougeL", "length_tokens", "perplexity")  # besides scorers
NARROWEST, CELL, WORDS = 100, 12, 30  # columns of a terminal: of a table in any case, of a heading, of a figure's name


def add_diff_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rlhf diff``, but for ``--home`` and ``--json``."""
    parser.add_argument("a", metavar="A", help=RUN)
    parser.add_argument("b", metavar="B", help="the same, of the other run")
    parser.add_argument("--all", action="store_true", help="show figures within noise that are not the main ones, too")


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rlhf compare``, but for ``--home`` and ``--json``."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"{RUN} (default: the last ones of a pipeline)")
    parser.add_argument("--pipeline", metavar="NAME", help="whose runs (default: that of the last finished run)")
    parser.add_argument("--last", type=int, default=10, metavar="N", help="how many (default: 10)")
    parser.add_argument("--metrics", metavar="A,B", help="figures to show, such as evaluate/ppo/kl,evaluate/ppo/rougeL")
    parser.add_argument("--csv", action="store_true", help="print CSV, with all figures unless --metrics chooses")


def diff(options: argparse.Namespace, console: Console) -> None:
    """Compare two runs."""
    from rlhf.runs import compared

    store = Store(home_directory(options.home))
    a, b = (compared.read(find_run(store.home, name), store) for name in (options.a, options.b))
    if options.json:
        print(json.dumps(compared.as_json(a, b), indent=1))
        return
    for letter, side in (("A", a), ("B", b)):
        console.print(f"{letter}  {_named(side.record)}", highlight=False, markup=False, soft_wrap=True)
    became: dict[str, list[str]] = {}
    for stage, what in compared.stages(a, b).items():
        became.setdefault(what, []).append(stage)
    words = {"same": "the same artifact", "same result": "made anew with the same result", "different": "differs"}
    print_table(("stages", ""), [(", ".join(names), words.get(what, what)) for what, names in became.items()], console)
    _print_changes(compared.changes(a, b), console)
    _print_figures(compared.compare(a, b), options.all, console)


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
    return f"{name}{_value(change.a)} -> {_value(change.b)}"


def _value(value: Any) -> str:
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
    found = {name: _win_rate(name) for start in WIN_RATES for name in figures if name.startswith(start)}
    found |= {name: label(name.removeprefix(prefix)).name for name in figures if policy and name.startswith(prefix)}
    found |= {name: words for name, words in OTHERS.items() if name in figures}
    return {name: words for name, words in found.items() if name in OTHERS or figures[name].note != NO_INTERVAL}


def _is_main(name: str) -> bool:
    """Whether a figure is shown even if it is within noise: win rates, scores, and the main ones of ``MAIN``."""
    if _win_rate(name):
        return name.startswith(tuple(WIN_RATES)[:2])
    metric = name.rpartition("/")[2]
    return name in OTHERS or metric in MAIN or metric not in LABELS


def _win_rate(name: str) -> str:
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


# ----------------------------------------------------------------------------------------------------- many runs
def compare(options: argparse.Namespace, console: Console) -> None:
    """Show runs side by side."""
    from rlhf.runs import compared

    store = Store(home_directory(options.home))
    records = _records(options, store)
    rows = compared.side_by_side([compared.read(record, store) for record in records])
    known = list(dict.fromkeys(name for row in rows for name in row.metrics))
    chosen = _chosen(options.metrics, known)
    if options.json or options.csv:
        made = [_flat(row, chosen or known, bounds=bool(chosen)) for row in rows]
        print(json.dumps(made, indent=1)) if options.json else _write_csv(made)
        return
    shown = chosen or [name for name in HEADLINES if name in known]
    columns = [
        ["run", *(row.record.id for row in rows)],
        ["began", *(time.strftime("%d %b %H:%M", time.localtime(row.record.started)) for row in rows)],
    ]
    for name in dict.fromkeys(name for row in rows for name in row.settings):
        columns.append([name.replace(".", ".\n"), *(_value(row.settings.get(name, "")) for row in rows)])
    figures = [[_heading(name), *(headlines.value(row.metrics, name, "\n") for row in rows)] for name in shown]
    fitting = figures if chosen else _fitting(figures, max(console.width, NARROWEST) - 1 - sum(map(_width, columns)))
    head, *cells = zip(*columns, *fitting, strict=True)
    print_table(head, cells, console)
    if others := shown[len(fitting) :]:
        console.print(f"There are also {', '.join(others)}: --metrics chooses, --csv has all.", soft_wrap=True)


def _fitting(columns: Sequence[list[str]], width: int) -> list[list[str]]:
    """The first columns that are together no wider than that; at least one."""
    ends = accumulate(map(_width, columns))
    return [
        column for number, (column, end) in enumerate(zip(columns, ends, strict=True)) if end <= width or not number
    ]


def _width(column: Sequence[str]) -> int:
    """What a column takes of a terminal, with the blanks around it."""
    return 2 + max(len(line) for cell in column for line in cell.split("\n"))


def _records(options: argparse.Namespace, store: Store) -> list[RunRecord]:
    """The runs that were named, or the last finished ones of a pipeline.

    Raises:
        ConfigError: there is none.
    """
    if options.last < 1:
        raise ConfigError(f"--last is {options.last}; it must be 1 or more")
    if options.runs:
        if options.pipeline:
            raise ConfigError("name runs, or --pipeline, not both")
        return [find_run(store.home, name) for name in options.runs]
    done = [record for record in read_runs(store.home) if record.status == "done"]
    pipeline = options.pipeline or (done[-1].pipeline if done else "")
    found = [record for record in done if record.pipeline == pipeline]
    if not found:
        known = ", ".join(sorted({record.pipeline for record in done})) or "none yet"
        raise ConfigError(
            f"no run of {pipeline or 'any pipeline'} in {store.home / 'runs'} is finished; pipelines: {known}"
        )
    return found[-options.last :]


def _chosen(text: str | None, known: Sequence[str]) -> list[str]:
    """The figures that --metrics names.

    Raises:
        ConfigError: no run has one of them.
    """
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"--metrics: no run has {name!r}{did_you_mean(name, known)}; `--json` shows all")
    return names


def _flat(row: Row, metrics: Sequence[str], bounds: bool) -> dict[str, Any]:
    """A run as one flat row, for a program; the bounds of chosen figures beside them."""
    ends = ("", "_low", "_high") if bounds else ("",)
    names = dict.fromkeys(f"{name}{end}" for name in metrics for end in ends)
    return {
        "run": row.record.id,
        "pipeline": row.record.pipeline,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(row.record.started)),
        **row.settings,
        **{name: row.metrics[name] for name in names if name in row.metrics},
    }


def _write_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _value(value) if value is not None else "" for name, value in row.items()} for row in rows)


def _heading(name: str) -> str:
    """What a figure is called at the head of a column: in lines that are no wider than the figures."""
    words = _win_rate(name) or OTHERS.get(name, name.replace("/", "/ "))
    policy, _, metric = name.removeprefix("evaluate/").partition("/")
    if policy in POLICIES and metric:
        words = f"{policy.upper()} {label(metric).name}"
    return textwrap.fill(words, CELL, break_long_words=False)
