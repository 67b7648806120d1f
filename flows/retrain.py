"""Retraining on a schedule: look whether anything changed, run what did, and let the gate decide."""

import threading
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.states import Completed
from pydantic import Field

from flows import promotion
from flows.pipeline import run_pipeline
from flows.promotion import Answer
from rlhf import champions
from rlhf.cache import Planner, Selection
from rlhf.champions import Contender
from rlhf.config import PipelineConfig
from rlhf.store import open_store
from tasks.prefect import ui as prefect_ui
from tasks.prefect.cancelling import cancellable
from tasks.prefect.flow_runs import flow_run_alive
from tasks.prefect.project import enter_project
from tasks.prefect.server import patiently
from tasks.slots import slot_of

NOTHING_NEW, PROMOTED, REFUSED = "Nothing new", "Promoted", "Refused"
POLL_SECONDS = 10  # between two looks whether a person has answered
GRACE_SECONDS = 3600  # in which it can be said that nobody has
NOBODY = "nobody"


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
    considered = champions.considered(store.home, config.name)
    last = considered.candidate if considered else champions.champion(store.home, config.name)
    plans = Planner(config, store).plan()
    changes = champions.news(store, last, plans)
    if not changes:
        words = _compared(plans[0].ingredients, [plan.stage for plan in plans])
        promotion.tell(store.home, config)
        return _end(NOTHING_NEW, [f"{words}: the same as of run {last.run_id if last else ''}."])
    for line in changes:
        get_run_logger().info("changed: %s", line)
    run = run_pipeline(config, Selection())
    candidate = Contender(run["run_id"], {stage: row["key"] for stage, row in run["stages"].items()})
    with flow_run_alive(store.home):
        decision = promotion.decide(
            store,
            config,
            candidate,
            who=champions.person(),
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
    in_time = threading.Timer(3600 * hours, _answer_for_nobody, [runtime.flow_run.id])
    in_time.daemon = True
    in_time.start()
    try:
        timeout = int(3600 * hours) + GRACE_SECONDS
        answer = pause_flow_run(wait_for_input=form, timeout=timeout, poll_interval=POLL_SECONDS)
    finally:
        in_time.cancel()
    if answer.who == NOBODY:
        return Answer(False, NOBODY, f"nobody approved it within {hours:g} hours")
    who = answer.who or "a person"
    said = f"{'approved' if answer.promote else 'refused'} by {who} in Prefect's UI"
    return Answer(answer.promote, who, f"{said}: {answer.why}" if answer.why else said)


def _answer_for_nobody(flow_run_id: str) -> None:
    """Fill in the form where nobody has: Prefect itself would let the run fail, and take no other end of it."""
    with get_client(sync_client=True) as client:
        patiently(lambda: client.resume_flow_run(UUID(flow_run_id), run_input={"promote": False, "who": NOBODY}))


def _compared(ingredients: Any, stages: list[str]) -> str:
    """What was looked at, in words."""
    data = sorted(name.split(" ", 1)[-1] for name in ingredients if name.startswith("data."))
    return f"Compared the data ({', '.join(data) or 'none'}), the configuration and the code of {', '.join(stages)}"


def _end(name: str, lines: list[str]) -> State[dict[str, Any]]:
    """The state that the flow ends in, which is also left in Prefect's UI."""
    prefect_ui.show_verdict(name, lines)
    return Completed(name=name, message=" ".join(lines), data={"verdict": name, "reasons": lines})
