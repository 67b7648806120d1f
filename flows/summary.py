"""Tables for a person: the plan, and what a run gave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rlhf.artifacts import Store
from rlhf.config import PipelineConfig
from rlhf.plan import StagePlan
from rlhf.settings import Preset

REASONS_SHOWN = 4
POLICIES = ("base", "sft", "ppo", "reference")
# The metrics of the result table, in its order; others are in the report.
ROWS = {
    "gold": "gold score",
    "reward": "reward",
    "rougeL": "ROUGE-L",
    "rouge1": "ROUGE-1",
    "bleu": "BLEU",
    "meteor": "METEOR",
    "length_tokens": "length (tokens)",
    "kl": "KL to SFT (nats)",
}


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
    config: PipelineConfig, plans: Sequence[StagePlan], store: Store, console: Console, *, up_to_date: bool
) -> None:
    """The figures of a pipeline that is up to date, and where to look further."""
    metrics: dict[str, float] = {}
    for plan in plans:
        metrics |= plan.manifest.metrics if plan.manifest else {}
    if up_to_date:
        last = plans[-1].stage
        scope = "all stages are" if last == "evaluate" else f"all stages until {last} are"
        console.print(f"[bold]{escape(config.name)}[/]: {scope} up to date", highlight=False)
    policies = [name for name in POLICIES if any(key.startswith(f"evaluate/{name}/") for key in metrics)]
    rows = [
        (label, *(_value(metrics, f"evaluate/{policy}/{metric}", "\n") for policy in policies))
        for metric, label in ROWS.items()
        if any(f"evaluate/{policy}/{metric}" in metrics for policy in policies)
    ]
    if rows:
        print_table(("held-out prompts", *policies), rows, console)
    lines = []
    if "reward/test_accuracy" in metrics:
        lines.append(f"Reward model: {_value(metrics, 'reward/test_accuracy')} of held-out pairs ordered rightly")
    wins = sorted(
        key for key in metrics if key.startswith("evaluate/win_rate/") and not key.endswith(("_low", "_high"))
    )
    for key in wins:
        lines.append(f"PPO against SFT, win rate by {key.rpartition('/')[2]}: {_value(metrics, key)}")
    for line in lines:
        console.print(line, highlight=False)
    report = plans[-1].key and store.path(plans[-1].stage, str(plans[-1].key)) / "report.html"
    console.print()
    if report and report.is_file():
        console.print(f"Report:  {report}", highlight=False, markup=False, soft_wrap=True)
    uri = config.tracking.uri or f"sqlite:///{store.home / 'mlflow.db'}"
    if uri.startswith("http"):
        console.print(f"MLflow:  {uri}", highlight=False, markup=False, soft_wrap=True)
    else:
        console.print(f"MLflow:  mlflow ui --backend-store-uri {uri}", highlight=False, markup=False, soft_wrap=True)
    console.print("Again:   rlhf plan --set ppo.kl_coef=0.1    rlhf run --only ppo    rlhf runs", highlight=False)


def duration(seconds: float) -> str:
    """Seconds as ``1 m 05 s``."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} m {int(seconds) % 60:02d} s"


def size(count: int) -> str:
    """Bytes as ``1.2 MB``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _value(metrics: dict[str, float], key: str, separator: str = " ") -> str:
    """A figure, and its interval where there is one."""
    if key not in metrics:
        return ""
    text = _number(metrics[key], 3)
    if f"{key}_low" in metrics:
        text += f"{separator}[{_number(metrics[f'{key}_low'], 2)}, {_number(metrics[f'{key}_high'], 2)}]"
    return text


def _number(value: float, decimals: int) -> str:
    return f"{value:.{decimals if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"
