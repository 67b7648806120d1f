"""``rlhf runs``: the runs on this machine."""

from __future__ import annotations

import argparse
import json
import time

from rich.console import Console

from flows.commands import options as given, summary
from rlhf.runs import headlines, read_runs
from rlhf.store import home_directory

ABOUT = "List the runs on this machine."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    given.add_json(parser)
    parser.add_argument("--last", type=given.count, default=20, help="how many (default: 20)")
    given.add_home(parser)


def command(options: argparse.Namespace, console: Console) -> None:
    """List them, oldest first."""
    records = read_runs(home_directory(options.home))
    if options.json:
        print(json.dumps([vars(record) for record in records], indent=1))
        return
    if not records:
        console.print("No run yet: rlhf run")
        return
    rows = []
    for record in records[-options.last :]:
        began = time.strftime("%d %b %H:%M", time.localtime(record.started))
        took = headlines.duration(record.ended - record.started) if record.ended else ""
        stages = " ".join(f"{name}{'' if row['cached'] else '*'}" for name, row in record.stages.items())
        rows.append((record.id, record.pipeline, record.status, began, took, stages))
    summary.print_table(("run", "pipeline", "status", "began", "took", "stages (* computed)"), rows, console)
