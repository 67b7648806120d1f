"""Whether a finished run becomes the champion: the gate decides, a person may be asked, MLflow is told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf import champions
from rlhf.champions import Considered, Contender
from rlhf.config import PipelineConfig
from rlhf.store import Store
from tasks.mlflow import registry
from tasks.mlflow.server import tracking_uri

if TYPE_CHECKING:
    from rlhf.champions import Verdict

Reasons = tuple[str, ...]


class Answer(NamedTuple):
    """What a person said of a candidate that the gate would promote."""

    approved: bool
    who: str
    why: str


class Decision(NamedTuple):
    """What became of a candidate. ``verdict`` is None where it has the champion's policy: nothing was to be decided."""

    candidate: Contender
    champion: Contender | None  # the one that it was compared with
    verdict: Verdict | None
    promoted: bool
    reasons: Reasons


def decide(
    store: Store,
    config: PipelineConfig,
    candidate: Contender,
    *,
    who: str,
    why: Reasons = (),
    ask: Callable[[Verdict], Answer] | None = None,
    turn: AbstractContextManager[Any] | None = None,
) -> Decision:
    """Let the gate decide whether a finished run becomes the champion of now; record it, and tell MLflow.

    Args:
        store: has the artifacts of both.
        config: of the candidate's run.
        candidate: the run.
        who: whose decision it is, where nobody is asked.
        why: what is to be kept beside the gate's reasons.
        ask: asks a person, before what the gate would promote is promoted.
        turn: is held while models compute.

    Raises:
        ConfigError: another run has become the champion while a person was asked.
        ArtifactError: artifacts of the candidate are gone or damaged, or a file of the champions is.
    """
    from rlhf.champions import contest, gate  # here, as torch comes with it

    holder = champions.champion(store.home, config.name)
    with turn or nullcontext():
        figures = contest.hold(config, store, candidate, holder)
    if figures is None:
        assert holder is not None
        same = f"the policy of run {candidate.run_id} is that of the champion, run {holder.run_id}: nothing to decide"
        decision = Decision(candidate, holder, None, False, (same,))
    else:
        verdict = gate.judged(figures, config.promotion)
        decision = Decision(candidate, holder, verdict, verdict.promote, (*why, *verdict.reasons))
        if decision.promoted and ask is not None:
            answer = ask(verdict)
            who, words = answer.who, (answer.why,) if answer.why else ()
            decision = decision._replace(promoted=answer.approved, reasons=(*words, *decision.reasons))
    if decision.promoted:
        champions.promote(store.home, config.name, candidate, over=holder, who=who, why=decision.reasons)
    champions.consider(store.home, config.name, Considered(candidate, decision.promoted, decision.reasons))
    tell(store.home, config)
    return decision


def tell(home: Path, config: PipelineConfig) -> bool:
    """Tell MLflow what it does not know of a pipeline's champions; whether it knows all now."""
    uri = tracking_uri(config.tracking.uri, home)
    return not config.tracking.enabled or registry.tell(home, config.name, uri)
