"""``rlhf show``: every setting of a configuration, with its description and unit."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from flows.commands import options as given
from rlhf.config import dump

ABOUT = "Print the whole configuration of a preset or file."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    for add in (given.add_source, given.add_json, given.add_home):
        add(parser)


def command(options: argparse.Namespace, console: Console) -> None:
    """Print it."""
    config = given.config_of(options)
    print(json.dumps(config.model_dump(mode="json"), indent=1) if options.json else dump(config), end="")
