"""What a run leaves in Prefect's UI: its stages as a table, the evaluation in figures and plots, links to run again.

A link opens the form of the deployment that the run came from, filled in with the run's own parameters, but for the
stage that is to be computed anew. Nothing here may fail a run: what cannot be shown is logged.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from prefect import artifacts, runtime
from prefect.settings import PREFECT_UI_URL

from rlhf.cache import StagePlan
from rlhf.runs import REPORT, headlines
from rlhf.stages import enabled_stages
from rlhf.store import disk
from tasks.mlflow.journal import PARENT
from tasks.mlflow.server import tracking_uri
from tasks.mlflow.sync import run_urls
from tasks.run import Run

log = logging.getLogger(__name__)

Rows = Sequence[Sequence[object]]


def flow_run_link() -> str:
    """A line of Markdown that leads from elsewhere to this run; empty where no deployment started it."""
    if runtime.deployment.id is None:
        return ""
    return f"Prefect run: [{runtime.flow_run.name}]({runtime.flow_run.ui_url})"


def show_plan(plans: Sequence[StagePlan]) -> None:
    """Leave the table of what would be computed, and why."""
    rows = [(plan.stage, plan.action, "; ".join(plan.reasons), _short(plan.key)) for plan in plans]
    with _not_failing():
        _leave("plan", table(("stage", "would", "why", "key"), rows), "What would be computed, and why")


def show_verdict(name: str, lines: Sequence[str]) -> None:
    """Leave what a retraining came to, and why."""
    text = f"## {name}\n\n" + "\n".join(f"- {line}" for line in lines)
    with _not_failing():
        _leave("retraining", text, "What the retraining came to")


def show_run(run: Run) -> None:
    """Leave the table of stages with links, and of the evaluation figures and plots, as far as the run came."""
    with _not_failing():
        _leave("stages", _stages(run), "The stages of this run")
        if "evaluate" in run.manifests:
            _leave("evaluation", _evaluation(run), "The policies on held-out prompts")
        for stage, manifest in run.manifests.items():
            for name in manifest.files:
                if name.endswith(".png"):
                    _leave_image(stage, run.directory(stage) / name)


class _Form(NamedTuple):
    """The run form of the deployment that this run came from: its address, and what to fill in."""

    address: str
    parameters: dict[str, Any]

    def link(self, stage: str, option: str) -> str:
        """The form with this run's parameters, and ``option`` set to the stage."""
        parameters = self.parameters | dict.fromkeys(("only", "from_stage", "until"), "none")
        parameters |= {"refresh": [], "dry_run": False, option: stage}
        text = json.dumps(parameters, default=_jsonable, separators=(",", ":"))
        return f"{self.address}?parameters={quote(text, safe='')}"


def _form() -> _Form | None:
    """The form to run again with; None without a deployment or an address of the UI. This asks the server."""
    deployment, base = runtime.deployment.id, PREFECT_UI_URL.value()
    if deployment is None or base is None:
        return None
    return _Form(f"{base}/deployments/deployment/{deployment}/run", dict(runtime.flow_run.parameters))


def table(head: Sequence[str], rows: Rows) -> str:
    """A table in Markdown; cells are shown as they are, on one line each."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _stages(run: Run) -> str:
    links, form = _mlflow_links(run), _form()
    rows = []
    for stage in run.selection.stages(run.config):
        plan, manifest = run.plans.get(stage), run.manifests.get(stage)
        if plan is None:
            rows.append([stage, "not reached", *[""] * 6])
            continue
        became = "failed or stopped" if manifest is None else "ran" if stage in run.computed else "cached"
        again = [
            f"[{text}]({form.link(stage, option)})"
            for text, option in (("only", "only"), ("from here", "from_stage"))
            if form is not None
        ]
        rows.append([
            stage,
            became,
            "; ".join(plan.reasons),
            _short(plan.key),
            disk.size(manifest.size) if manifest else "",
            headlines.duration(manifest.seconds) if manifest else "",
            f"[run]({links[stage]})" if stage in links else "",
            ", ".join(again),
        ])  # fmt: skip
    head = ("stage", "", "why", "key", "size", "computed in", "MLflow", "run again")
    off = [stage for stage in ("sft", "judge", "reward", "ppo", "evaluate") if stage not in enabled_stages(run.config)]
    notes = [f"Run `{run.id}` of the pipeline `{run.config.name}`."]
    notes += [f"Off in this configuration: {', '.join(off)}."] if off else []
    return f"{table(head, rows)}\n\n{' '.join(notes)}"


def _evaluation(run: Run) -> str:
    metrics = {name: value for manifest in run.manifests.values() for name, value in manifest.metrics.items()}
    head, rows = headlines.figures(metrics)
    lines = "\n".join(f"- {line}" for line in headlines.sentences(metrics))
    report = (run.journal.directory / REPORT).resolve()
    text = f"{table(head, rows)}\n\n{lines}\n\nThe report: `{report}`"
    if (link := _mlflow_links(run).get(PARENT)) and report.is_file():
        text += f", and in [MLflow]({link}/artifacts/{REPORT})"
    return f"{text}."


def _mlflow_links(run: Run) -> dict[str, str]:
    """Where a browser shows the MLflow runs, as far as they have been shipped."""
    if not run.config.tracking.enabled:
        return {}
    return run_urls(run.journal.directory, tracking_uri(run.config.tracking.uri, run.store.home))


def _leave(key: str, markdown: str, description: str) -> None:
    artifacts.create_markdown_artifact(markdown, key=key, description=description)


def _leave_image(stage: str, path: Path) -> None:
    """Leave a picture, in the artifact itself: the browser may have no other way to it."""
    data = base64.b64encode(path.read_bytes()).decode()
    key = f"{stage}-{path.stem}".lower().replace("_", "-")
    artifacts.create_image_artifact(f"data:image/png;base64,{data}", key=key, description=f"{stage}: {path.stem}")


@contextmanager
def _not_failing() -> Iterator[None]:
    """Go on without what the UI shows. After one error the rest is left out: each may take long."""
    try:
        yield
    except Exception:
        log.exception("what the Prefect UI shows of this run could not be made")


def _short(key: str | None) -> str:
    return f"`{key[:12]}`" if key else ""


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _jsonable(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)
