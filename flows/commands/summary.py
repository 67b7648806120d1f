"""Tables for a person: the plan, and what a run gave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rlhf.cache import StagePlan
from rlhf.config import PipelineConfig, Preset
from rlhf.runs import headlines, report_of
from rlhf.store import Store
from tasks.mlflow.server import tracking_uri

REASONS_SHOWN = 4


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    """A plain table; cells are shown as they are."""
    table = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)


def print_presets(presets: Iterable[Preset], console: Console) -> None:
    """One paragraph for each preset."""
    for preset in presets:
        sizes = f"   (--size {', '.join(preset.sizes)})" if preset.sizes else ""
        console.print()
        console.print(f"[bold]{preset.name}[/bold][dim]{sizes}[/dim]", highlight=False)
        for text in (preset.description, f"Needs {preset.needs}"):
            console.print(Padding(Text(text), (0, 0, 0, 2)))
    console.print()


def print_plan(plans: Sequence[StagePlan], console: Console) -> None:
    """Each stage: cached or to be run, and why."""
    table = Table("stage", "", "why", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for plan in plans:
        shown = [*plan.reasons[:REASONS_SHOWN]]
        if len(plan.reasons) > REASONS_SHOWN:
            shown.append(f"and {len(plan.reasons) - REASONS_SHOWN} more")
        action = "[green]cached" if plan.action == "cached" else "[yellow]run"
        table.add_row(plan.stage, action, escape("\n".join(shown)))
    console.print(table)


def print_result(
    config: PipelineConfig, plans: Sequence[StagePlan], store: Store, console: Console, *, up_to_date: bool, words: str
) -> None:
    """The figures of a pipeline that is up to date, and where to look further.

    Args:
        words: what names the configuration on the command line; empty for the default one.
    """
    metrics: dict[str, float] = {}
    for plan in plans:
        metrics |= plan.manifest.metrics if plan.manifest else {}
    if up_to_date:
        last = plans[-1].stage
        scope = "all stages are" if last == "evaluate" else f"all stages until {last} are"
        console.print(f"[bold]{escape(config.name)}[/]: {scope} up to date", highlight=False)
    head, rows = headlines.figures(metrics, "\n")
    if rows:
        print_table(head, rows, console)
    for line in headlines.sentences(metrics):
        console.print(line, highlight=False)
    console.print()
    if report := report_of({plan.stage: plan.key for plan in plans}, store.home):
        console.print(f"Report:  {report}", highlight=False, markup=False, soft_wrap=True)
    uri = tracking_uri(config.tracking.uri, store.home)
    if uri.startswith("http"):
        console.print(f"MLflow:  {uri}", highlight=False, markup=False, soft_wrap=True)
    else:
        console.print(f"MLflow:  mlflow ui --backend-store-uri {uri}", highlight=False, markup=False, soft_wrap=True)
    stages = [plan.stage for plan in plans]
    stage, setting = ("ppo", "ppo.kl_coef=0.1") if "ppo" in stages else (stages[-1], f"seed={config.seed + 1}")
    named = f" {words}" if words else ""
    again = (f"rlhf plan{named} --set {setting}", f"rlhf run{named} --only {stage}", "rlhf runs")
    console.print(f"Again:   {'    '.join(again)}", highlight=False, markup=False, soft_wrap=True)
