"""``rlhf plan``: what would run, and why; nothing is computed."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console

from flows.commands import options as given, summary
from rlhf.cache import Planner, StagePlan
from rlhf.store import open_store

ABOUT = "Show which stages are cached, which would run, and why."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    for add in (given.add_source, given.add_selection, given.add_store, given.add_json, given.add_home):
        add(parser)


def command(options: argparse.Namespace, console: Console) -> None:
    """Print the plan."""
    plans = Planner(given.config_of(options), open_store(options.home), given.selection_of(options)).plan()
    if options.json:
        print(json.dumps([as_json(plan) for plan in plans], indent=1))
    else:
        summary.print_plan(plans, console)


def as_json(plan: StagePlan) -> dict[str, Any]:
    """A stage's plan for a program to read."""
    return {"stage": plan.stage, "action": plan.action, "reasons": list(plan.reasons), "key": plan.key}
