"""Retraining on a schedule: look whether anything changed, run what did, and let the gate decide."""

from dataclasses import replace
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.cancelling import cancellable
from flows.pipeline import run_pipeline
from flows.project import enter_project
from rlhf import champion
from rlhf.champion import Contender
from rlhf.config import PipelineConfig
from rlhf.plan import Planner, Selection
from rlhf.stores import open_store
from tasks import prefect_ui

NOTHING_NEW, PROMOTED, REFUSED = "Nothing new", "Promoted", "Refused"


@flow(name="retrain", flow_run_name="retrain {config.name}", validate_parameters=True, persist_result=False)
@cancellable
def retrain(config: PipelineConfig) -> State[dict[str, Any]]:
    """Run the pipeline if data, configuration or code changed since the champion; promote the result if it is better.

    Args:
        config: The whole configuration; `promotion` says what the gate compares.

    Returns:
        A state named "Nothing new", "Promoted" or "Refused", whose message says why.
    """
    enter_project()
    store = open_store()
    holder = champion.read(store.home, "champions", config.name)
    last = champion.read(store.home, "candidates", config.name) or holder
    plans = Planner(config, store).plan()
    changes = champion.news(store, last, plans)
    if not changes:
        words = _compared(plans[0].ingredients, [plan.stage for plan in plans])
        return _end(NOTHING_NEW, [f"{words}: the same as of run {last.run_id if last else ''}."])
    for line in changes:
        get_run_logger().info("changed: %s", line)
    run = run_pipeline(config, Selection())
    keys = {stage: row["key"] for stage, row in run["stages"].items()}
    metrics = {name: value for stage, key in keys.items() for name, value in store.open(stage, key).metrics.items()}
    candidate = Contender(run["run_id"], keys, metrics)
    verdict = champion.better_by(config.promotion)(candidate, holder)
    judged = replace(candidate, why=verdict.reasons)
    champion.write(store.home, "candidates", config.name, judged)
    if verdict.promote:
        champion.write(store.home, "champions", config.name, judged)
    return _end(PROMOTED if verdict.promote else REFUSED, [*verdict.reasons, "Changed:", *changes])


def _compared(ingredients: Any, stages: list[str]) -> str:
    """What was looked at, in words."""
    data = sorted(name.split(" ", 1)[-1] for name in ingredients if name.startswith("data."))
    return f"Compared the data ({', '.join(data) or 'none'}), the configuration and the code of {', '.join(stages)}"


def _end(name: str, lines: list[str]) -> State[dict[str, Any]]:
    """The state that the flow ends in, which is also left in Prefect's UI."""
    prefect_ui.show_verdict(name, lines)
    return Completed(name=name, message=" ".join(lines), data={"verdict": name, "reasons": lines})
