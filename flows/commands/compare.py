"""``rlhf compare``: runs side by side."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from rich.console import Console

from flows.commands import options as given
from flows.commands.diff import OTHERS, POLICIES, RUN, as_written, win_rate
from flows.commands.summary import print_table
from rlhf.champions import find_run
from rlhf.errors import ConfigError, did_you_mean
from rlhf.metrics import label
from rlhf.runs import RunRecord, headlines, read_runs
from rlhf.store import Store, home_directory

if TYPE_CHECKING:
    from rlhf.runs import Row

ABOUT = "Show runs side by side: the settings in which they differ, and what they measured."
# What a table of runs shows first, as far as it is there and fits.
HEADLINES = (
    "evaluate/win_rate/held_out", "evaluate/win_rate/gold", "evaluate/ppo/kl", "evaluate/ppo/reward",
    "evaluate/ppo/rougeL", "evaluate/win_rate_length_controlled/held_out", "ppo/overoptimised",
    "evaluate/win_rate/reward", "evaluate/sft/rougeL", "reward/test_accuracy",
)  # fmt: skip
NARROWEST, CELL = 100, 12  # columns of a terminal: of a table in any case, of a heading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"{RUN} (default: the last ones of a pipeline)")
    parser.add_argument("--pipeline", metavar="NAME", help="whose runs (default: that of the last finished run)")
    parser.add_argument("--last", type=int, default=10, metavar="N", help="how many (default: 10)")
    parser.add_argument("--metrics", metavar="A,B", help="figures to show, such as evaluate/ppo/kl,evaluate/ppo/rougeL")
    parser.add_argument("--csv", action="store_true", help="print CSV, with all figures unless --metrics chooses")
    given.add_json(parser)
    given.add_home(parser)


def command(options: argparse.Namespace, console: Console) -> None:
    """Show runs side by side."""
    from rlhf.runs import comparison

    store = Store(home_directory(options.home))
    records = _records(options, store)
    rows = comparison.side_by_side([comparison.read(record, store) for record in records])
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
        columns.append([name.replace(".", ".\n"), *(as_written(row.settings.get(name, "")) for row in rows)])
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
    writer.writerows(
        {name: as_written(value) if value is not None else "" for name, value in row.items()} for row in rows
    )


def _heading(name: str) -> str:
    """What a figure is called at the head of a column: in lines that are no wider than the figures."""
    words = win_rate(name) or OTHERS.get(name, name.replace("/", "/ "))
    policy, _, metric = name.removeprefix("evaluate/").partition("/")
    if policy in POLICIES and metric:
        words = f"{policy.upper()} {label(metric).name}"
    return textwrap.fill(words, CELL, break_long_words=False)
