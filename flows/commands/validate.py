"""``rlhf validate``: a configuration, and every row of the data that it names."""

from __future__ import annotations

import argparse

from rich.console import Console

from flows.commands import options as given
from rlhf.cache import Planner
from rlhf.store import open_store

ABOUT = "Check a configuration and every row of the data that it names."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    for add in (given.add_source, given.add_store, given.add_home):
        add(parser)


def command(options: argparse.Namespace, console: Console) -> None:
    """Check it, and say how much data there is.

    Raises:
        InputError: something is wrong with it.
    """
    config = given.config_of(options)
    Planner(config, open_store(options.home)).plan()  # the files and functions that it names are there
    from rlhf.prepare import check

    checked = check(config)  # every row is as it must be
    rows = ", ".join(f"{sized.kept} {kind}" for kind, sized in checked.kinds.items())
    console.print(f"{options.source}: valid; pipeline {config.name!r}, {rows}", highlight=False, markup=False)
