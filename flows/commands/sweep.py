"""``rlhf sweep``: the pipeline for every combination of some values."""

from __future__ import annotations

import argparse
import json
from typing import Literal

from rich.console import Console

from flows.commands import options as given, summary
from flows.commands.run import server_for
from rlhf.store import open_store

ABOUT = "Run the pipeline for every combination of some values."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    for add in (given.add_source, given.add_store, given.add_json):
        add(parser)
    parser.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="K=[V,...]",
        help="values to try: --over ppo.kl_coef=[0.02,0.1]",
    )
    parser.add_argument("--runs", type=given.count, default=2, help="most runs at once (default: 2)")
    parser.add_argument("--ray", action="store_true", help="on a Ray cluster that sees the same home folder")
    given.add_home(parser)


def command(options: argparse.Namespace, console: Console) -> None:
    """Run them, and print which run is which."""
    given.config_of(options)
    if server := server_for(open_store(options.home)):
        server.wait()
    from flows.sweep import sweep
    from flows.team.heartbeats import looked_after

    where: Literal["ray", "processes"] = "ray" if options.ray else "processes"
    with looked_after():
        done = sweep(options.source, options.size or "", options.set or [], options.over, options.runs, where)
    if options.json:
        print(json.dumps(done, indent=1))
        return
    rows = []
    for name, run in done.items():
        computed = " ".join(stage for stage, row in run["stages"].items() if not row["cached"])
        rows.append((name, run["run_id"], "  ".join(run["settings"]), computed))
    summary.print_table(("pipeline", "run", "settings", "computed; the rest came from the cache"), rows, console)
