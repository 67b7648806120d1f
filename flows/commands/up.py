"""``rlhf up``: everything that a team works with, on one machine, until Ctrl-C (``flows.team.up``)."""

from __future__ import annotations

import argparse

from rich.console import Console

from flows.commands import options as given

ABOUT = "Start Prefect, MLflow, the deployments and a worker on this machine; Ctrl-C ends all of it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--prefect-port", type=int, default=4200, help="port of Prefect (default: 4200)")
    parser.add_argument("--mlflow-port", type=int, default=5000, help="port of MLflow (default: 5000)")
    parser.add_argument(
        "--database-url",
        help="postgresql://user@host:port/name: Prefect and MLflow keep their state there; the password is better in "
        "PGPASSWORD. Default: SQLite files in the home folder, which do for one person",
    )
    parser.add_argument("--runs", type=int, default=4, help="most runs at once (default: 4)")
    given.add_store(parser)
    given.add_home(parser)


def command(options: argparse.Namespace, console: Console) -> int:
    """Start all of it; the exit code."""
    from flows.team.up import up

    return up(options, console)
