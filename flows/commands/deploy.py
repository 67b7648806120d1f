"""``rlhf deploy``: deployments on a Prefect server, and retraining on a schedule."""

from __future__ import annotations

import argparse
import os

from rich.console import Console

from flows.commands import options as given
from rlhf.errors import ConfigError

ABOUT = "Put deployments on the Prefect server of PREFECT_API_URL."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    given.add_source(parser)
    parser.add_argument("--cron", help="when to look for something new and retrain, such as '0 3 * * *'")
    parser.add_argument("--timezone", default="UTC", help="time zone of --cron (default: UTC)")
    parser.add_argument(
        "--shipped", action="store_true", help="and each preset whose data is on a hub or comes with this package"
    )
    parser.add_argument("--pool", default="rlhf", help="work pool that runs them (default: rlhf)")
    given.add_home(parser)


def command(options: argparse.Namespace, console: Console) -> None:
    """Deploy, and print what was made.

    Raises:
        ConfigError: no server is named, or it cannot be reached.
    """
    config = given.config_of(options)
    if "PREFECT_API_URL" not in os.environ:
        raise ConfigError(
            "deploy puts deployments on a Prefect server, but PREFECT_API_URL does not name one; `rlhf up` starts one "
            "and prints its address (add /api)"
        )
    import httpx

    from flows.team.deployments import apply, schedule, shipped

    configs = {one.name: one for one in [*(shipped() if options.shipped else []), config]}
    try:
        found = [schedule(config, options.cron, options.timezone, options.pool)] if options.cron else []
        found += apply(configs.values(), options.pool)
    except httpx.HTTPError as error:
        raise ConfigError(
            f"PREFECT_API_URL is {os.environ['PREFECT_API_URL']!r}, where deploying failed ({type(error).__name__}: "
            f"{error}); start the Prefect server (`rlhf up` does), or correct the address, which ends with /api"
        ) from None
    for made in found:
        console.print(f"{made.name}  {made.id}", highlight=False, markup=False, soft_wrap=True)
