"""Retraining on a schedule: look whether anything changed, run what did, and let the gate decide."""

from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.states import Completed
from pydantic import Field

from flows import champions
from flows.cancelling import cancellable
from flows.champions import Answer
from flows.pipeline import run_pipeline
from flows.project import enter_project
from rlhf import champion
from rlhf.champion import Contender
from rlhf.config import PipelineConfig
from rlhf.plan import Planner, Selection
from rlhf.stores import open_store
from tasks import prefect_ui
from tasks.flow_runs import flow_run_alive
from tasks.slots import slot_of

NOTHING_NEW, PROMOTED, REFUSED = "Nothing new", "Promoted", "Refused"
POLL_SECONDS = 10  # between two looks whether a person has answered


class Approval(RunInput):
    """The form that a person fills in before the champion changes."""

    promote: bool = Field(False, description="Whether the candidate becomes the champion.")
    who: str = Field("", description="Your name, which is kept.")
    why: str = Field("", description="Your reason, which is kept.")


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
    considered = champion.considered(store.home, config.name)
    last = considered.candidate if considered else champion.champion(store.home, config.name)
    plans = Planner(config, store).plan()
    changes = champion.news(store, last, plans)
    if not changes:
        words = _compared(plans[0].ingredients, [plan.stage for plan in plans])
        champions.tell(store.home, config)
        return _end(NOTHING_NEW, [f"{words}: the same as of run {last.run_id if last else ''}."])
    for line in changes:
        get_run_logger().info("changed: %s", line)
    run = run_pipeline(config, Selection())
    candidate = Contender(run["run_id"], {stage: row["key"] for stage, row in run["stages"].items()})
    with flow_run_alive(store.home):
        decision = champions.decide(
            store,
            config,
            candidate,
            who=champion.person(),
            ask=(lambda verdict: ask(config, candidate, verdict.reasons)) if config.promotion.approval else None,
            turn=slot_of(config, store.home),
        )
    name = NOTHING_NEW if decision.verdict is None else PROMOTED if decision.promoted else REFUSED
    return _end(name, [*decision.reasons, "Changed:", *changes])


def ask(config: PipelineConfig, candidate: Contender, reasons: tuple[str, ...]) -> Answer:
    """Ask a person in Prefect's UI: the run is paused, and its button Resume has the form."""
    hours = config.promotion.approval_hours
    lines = "\n".join(f"- {reason}" for reason in reasons)
    about = f"The gate would make run `{candidate.run_id}` the champion of `{config.name}`:\n\n{lines}"
    form = Approval.with_initial_data(description=about)
    get_run_logger().info("the gate would promote; waiting %g hours for a person's approval", hours)
    try:
        answer = pause_flow_run(wait_for_input=form, timeout=int(3600 * hours), poll_interval=POLL_SECONDS)
    except FlowPauseTimeout:
        return Answer(False, "nobody", f"nobody approved it within {hours:g} hours")
    verb = "approved" if answer.promote else "refused"
    said = f"{verb} by {answer.who or 'a person'} in Prefect's UI"
    return Answer(
        answer.promote, answer.who or "a person in Prefect's UI", f"{said}: {answer.why}" if answer.why else said
    )


def _compared(ingredients: Any, stages: list[str]) -> str:
    """What was looked at, in words."""
    data = sorted(name.split(" ", 1)[-1] for name in ingredients if name.startswith("data."))
    return f"Compared the data ({', '.join(data) or 'none'}), the configuration and the code of {', '.join(stages)}"


def _end(name: str, lines: list[str]) -> State[dict[str, Any]]:
    """The state that the flow ends in, which is also left in Prefect's UI."""
    prefect_ui.show_verdict(name, lines)
    return Completed(name=name, message=" ".join(lines), data={"verdict": name, "reasons": lines})
