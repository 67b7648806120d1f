"""``rlhf report``: the report of a run, made anew."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from flows.commands import options as given
from rlhf.champions import find_run
from rlhf.errors import ConfigError
from rlhf.runs import RunRecord, read_runs
from rlhf.store import Store, home_directory

ABOUT = "Write the report of a run, one HTML file that needs no network, and print where it is."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="run id, or pipeline (its last finished run); default: the last run"
    )
    given.add_json(parser)
    given.add_home(parser)


def command(options: argparse.Namespace, console: Console) -> None:
    """Make the report of a run anew.

    Raises:
        ConfigError: there is no such run.
    """
    from rlhf.report import write  # Jinja and more, which most commands do without

    home = home_directory(options.home)
    path = write(find_run(home, options.run) if options.run else _last(home), Store(home))
    if options.json:
        print(json.dumps({"report": str(path)}))
    else:
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)


def _last(home: Path) -> RunRecord:
    records = read_runs(home)
    if not records:
        raise ConfigError(f"there is no run in {home / 'runs'} to report on; `rlhf run` makes one")
    return records[-1]
