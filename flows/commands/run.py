"""``rlhf run``: the pipeline, in this process; what is up to date comes from the cache and loads nothing heavy."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from rich.console import Console

from flows.commands import options as given, plan as planned, summary
from rlhf.cache import Planner, Selection, StagePlan
from rlhf.config import PipelineConfig
from rlhf.store import Store, named_if_full, open_store

if TYPE_CHECKING:
    from flows.team.server import Server

ABOUT = "Run the pipeline; what is up to date comes from the cache."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    for add in (given.add_source, given.add_selection, given.add_store, given.add_json, given.add_home):
        add(parser)


def command(options: argparse.Namespace, console: Console) -> None:
    """Run the pipeline, and print what came of it.

    Raises:
        InputError: configuration, selection or data is wrong.
        RlhfError: a stage failed.
    """
    config, store, selection = given.config_of(options), open_store(options.home), given.selection_of(options)
    plans = Planner(config, store, selection).plan()
    if all(plan.action == "cached" and not plan.place for plan in plans):
        for plan in plans:
            store.touch(plan.stage, str(plan.key))
        store.send_unsent()
    else:
        if not options.json:
            summary.print_plan(plans, console)
        _execute(config, selection, store, Console(stderr=True) if options.json else console)
        console.print() if not options.json else None
        plans = Planner(config, store, Selection(until=selection.only or selection.until)).plan()
    if options.json:
        print(json.dumps({"stages": [planned.as_json(plan) | {"metrics": _metrics(plan)} for plan in plans]}, indent=1))
    else:
        up_to_date = all(plan.action == "cached" for plan in plans)
        summary.print_result(config, plans, store, console, up_to_date=up_to_date, words=given.words_of(options))


def _execute(config: PipelineConfig, selection: Selection, store: Store, console: Console) -> None:
    """Run the Prefect flow in this process."""
    from flows.display import make_display

    server = server_for(store)
    from flows.pipeline import NONE, pipeline, watcher
    from flows.team.heartbeats import looked_after

    if server is not None:
        server.wait()
    display = make_display(console)
    token = watcher.set(display)
    try:
        with looked_after(), named_if_full(store.home):  # Prefect's own database is there, too
            pipeline(
                config,
                only=selection.only or NONE,
                from_stage=selection.start or NONE,
                until=selection.until or NONE,
                refresh=sorted(selection.refresh),
            )
    finally:
        display.close()
        watcher.reset(token)


def server_for(store: Store) -> Server | None:
    """Set Prefect up, before it is imported; its server, if it has to be started."""
    from flows.team.server import configure, connect

    os.environ["RLHF_HOME"] = str(store.home)
    configure(store.home)
    return connect(store.home)


def _metrics(plan: StagePlan) -> dict[str, float]:
    return plan.manifest.metrics if plan.manifest else {}
