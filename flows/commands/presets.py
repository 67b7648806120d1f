"""``rlhf presets``: the configurations that come with the package."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from flows.commands import options as given, summary
from rlhf.config import presets

ABOUT = "List the presets."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    given.add_json(parser)
    given.add_home(parser)


def command(options: argparse.Namespace, console: Console) -> None:
    """Print them."""
    if options.json:
        print(json.dumps([preset._asdict() for preset in presets().values()], indent=1))
    else:
        summary.print_presets(presets().values(), console)
