"""The report of a run, ``<home>/runs/<run id>/report.html``: made at the end of each run, and by ``rlhf report``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rlhf.cache.plan import StagePlan
from rlhf.errors import ConfigError
from rlhf.runs.records import REPORT, RunRecord, find_run, read_runs
from rlhf.store.artifacts import Store
from rlhf.store.locations import home_directory

ABOUT = "Write the report of a run, one HTML file that needs no network, and print where it is."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rlhf report``, but for ``--home`` and ``--json``."""
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="run id, or pipeline (its last finished run); default: the last run"
    )


def report(options: argparse.Namespace, console: Console) -> None:
    """Make the report of a run anew.

    Raises:
        ConfigError: there is no such run.
    """
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


def write(record: RunRecord, store: Store) -> Path:
    """Write the report of a run from what its stages left; where it is.

    Raises:
        OSError: it cannot be written.
    """
    from rlhf.report import page, sources_of  # Jinja and more, which most commands do without

    path = store.home / "runs" / record.id / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page(sources_of(record, store)), encoding="utf-8")
    os.replace(temporary, path)
    return path.resolve()


def of_plans(plans: Sequence[StagePlan], home: Path) -> Path | None:
    """The report of the last run that had these very artifacts; None where there is none."""
    keys = {plan.stage: plan.key for plan in plans}
    for record in reversed(read_runs(home)):
        path = home / "runs" / record.id / REPORT
        if {stage: row["key"] for stage, row in record.stages.items()} == keys and path.is_file():
            return path.resolve()
    return None
