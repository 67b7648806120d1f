"""``rlhf sheet``: a blind sheet for people who judge responses, and their verdicts read back."""

from __future__ import annotations

import argparse
import getpass
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from flows.commands import options as given
from flows.commands.summary import print_table
from rlhf.champions import CHAMPION, find_run
from rlhf.errors import ConfigError
from rlhf.metrics import label
from rlhf.runs import headlines
from rlhf.store import home_directory, open_store

ABOUT = (
    "Write a sheet on which people judge pairs of responses without knowing whose they are, or read one back. A "
    "verdict is A, B or tie."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("run", nargs="?", metavar="RUN", help=f"run id, pipeline, or {CHAMPION}PIPELINE")
    parser.add_argument("--out", type=Path, metavar="F", help="the sheet to write: .csv or .parquet")
    parser.add_argument("--policies", metavar="P,Q", help="whose responses (default: the last policy, the one before)")
    parser.add_argument("--rows", type=int, metavar="N", help="prompts drawn at random (default: all)")
    parser.add_argument("--seed", type=int, metavar="S", help="of the draw and of the sides (default: 0)")
    parser.add_argument("--read", type=Path, metavar="F", help="a sheet that came back with verdicts")
    parser.add_argument("--by", metavar="NAME", help="who has judged (default: the name of this machine's user)")
    given.add_store(parser)
    given.add_json(parser)
    given.add_home(parser)


def command(options: argparse.Namespace, console: Console) -> None:
    """Run the command.

    Raises:
        ConfigError: the options do not go together.
    """
    making = [options.run, options.out, options.policies, options.rows, options.seed]
    if options.read is not None and any(option is not None for option in making):
        raise ConfigError("--read takes a sheet that came back, with --by alone; leave out the options that make one")
    if options.read is not None:
        _read(options, console)
    elif options.run is None or options.out is None or options.by is not None:
        raise ConfigError("expected `rlhf sheet RUN --out sheet.csv`, or `rlhf sheet --read sheet.csv --by NAME`")
    else:
        _write(options, console)


def _write(options: argparse.Namespace, console: Console) -> None:
    from rlhf.feedback import sheets

    if options.rows is not None and options.rows < 1:
        raise ConfigError(f"--rows is {options.rows}; it must be 1 or more")
    if options.seed is not None and options.seed < 0:
        raise ConfigError(f"--seed is {options.seed}; it must be 0 or more")
    store = open_store(options.home)
    made = sheets.make(find_run(store.home, options.run), store, options.policies, options.rows, options.seed or 0)
    key = sheets.write(made, options.out, store.home)
    rows, identical = len(made.key.rows), len(made.key.identical)
    if options.json:
        about = {"sheet": made.key.sheet, "out": str(options.out), "key": str(key)}
        print(json.dumps(about | {"rows": rows, "identical": identical}, indent=1))
        return
    for line in (
        f"{options.out}: {rows} pairs of responses of {made.key.candidate} and {made.key.baseline} to run "
        f"{made.key.run}; {identical} identical pairs are left out, and count as ties",
        f"{key}: whose they are; not for those who judge",
        f"Then:  rlhf sheet --read {options.out} --by NAME",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _read(options: argparse.Namespace, console: Console) -> None:
    from rlhf.feedback import verdicts

    home = home_directory(options.home)
    reader = options.by if options.by is not None else os.environ.get("RLHF_USER") or getpass.getuser()
    key, found = verdicts.read(options.read, home)
    entry = verdicts.keep(key, found, reader, home)
    between = [pair for pair in verdicts.kept(home, key.run)["between"] if reader in pair["readers"]]
    if options.json:
        print(json.dumps({"run": key.run, "reader": reader, **entry, "between": between}, indent=1))
        return
    console.print(
        f"{reader}: {len(found)} of {len(key.rows)} pairs of {key.candidate} and {key.baseline} judged, run {key.run}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    rows = [
        ("win rate", _figure(entry["win_rate"]), f"wins {entry['wins']:.2f}, ties {entry['ties']:.2f}, "
         f"losses {entry['losses']:.2f}"),
        *((f"{label(score).name} agrees", _figure(found), f"{found['n']} pairs") for score, found in
          entry["agreement"].items()),
        *((f"{_of_two(pair, reader)} agrees", _share(pair["agreement"]), f"{pair['rows']} pairs, Cohen's kappa "
           f"{_share(pair['kappa'])}") for pair in between),
    ]  # fmt: skip
    print_table(("", "share", ""), rows, console)


def _of_two(pair: Mapping[str, Any], reader: str) -> str:
    """The other reader."""
    return str(next(name for name in pair["readers"] if name != reader))


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _figure(estimate: Mapping[str, Any]) -> str:
    figures = {"x": estimate["value"], "x_low": estimate["low"], "x_high": estimate["high"]}
    known = {name: value for name, value in figures.items() if value is not None}
    return headlines.value(known, "x") or "unknown"
