"""Runs that die on machines where nobody of us looks: found by heartbeats that stop, on the Prefect server itself.

Every process that carries a flow run tells the server twice a minute that it lives. Two automations of the server
draw the conclusions: a run that is not heard of for ``DEAD_SECONDS`` becomes Crashed; one that is Crashed and still
heard of becomes Running again, which is how a false alarm ends (after an outage of the server or the network, say).
On the machine of the home folder ``flows.team.reaper`` knows at once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tasks.prefect.server import is_private

if TYPE_CHECKING:
    from prefect.events.schemas.automations import AutomationCore

TAG = "rlhf"  # of the runs that are looked after
HEARTBEAT_SECONDS = 30  # the shortest that Prefect takes
# Ten heartbeats, so that a stage which holds the interpreter, or a server that hangs for a minute, is no alarm. It is
# also more than Prefect's own 180 s between heartbeats, for runs that have not got the setting. Not less than this: a
# change of state within 5 minutes of the last one waits for 15 in a server that was not there at both.
DEAD_SECONDS = 300.0
# Heartbeats after which a run that is Crashed lives: of a run that is tried again and ends at once, there is only one.
ALIVE_HEARTBEATS = 2
ALIVE_HOURS = 24.0  # within which they must come
ENVIRONMENT = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}  # of processes that carry runs
# Of the server: it would forget after a minute whom it was waiting for while it was away itself.
SERVER_ENVIRONMENT = {"PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "P7D"}

LOST, FOUND = "rlhf: no heartbeat", "rlhf: heartbeat again"  # names of the automations
HEARTBEAT = "prefect.flow-run.heartbeat"


def look_after_runs(dead_seconds: float = DEAD_SECONDS) -> dict[str, str]:
    """Put both automations on the server of ``PREFECT_API_URL``, each once, by its name; their ids.

    One that is there and differs is changed; whether it is switched on is left alone. Also a build step of
    ``deployments/prefect.yaml``.

    Args:
        dead_seconds: how long a run that is not heard of counts as alive; more than ``HEARTBEAT_SECONDS``.
    """
    from prefect.client.orchestration import get_client

    ids = {}
    with get_client(sync_client=True) as client:
        for wanted in (_lost(dead_seconds), _found()):
            found = client.read_automations_by_name(wanted.name)
            if not found:
                ids[wanted.name] = str(client.create_automation(wanted))
                continue
            first, *others = found
            for other in others:  # made by another process in the same moment
                client.delete_automation(other.id)
            ids[wanted.name] = str(first.id)
            wanted.enabled = first.enabled
            # Not where nothing differs: what the server waits for at the moment is forgotten with a change.
            if first.model_dump(exclude={"id"}) != wanted.model_dump():
                client.update_automation(first.id, wanted)
    return ids


def looked_after() -> AbstractContextManager[Any]:
    """Flows that are called in here are among the runs that are looked after; none is where no other looks.

    Nothing is tagged in vain: Prefect asks the server for limits of a tag before and after every task.
    """
    from prefect import tags

    return nullcontext() if is_private() else tags(TAG)


def _lost(dead_seconds: float) -> AutomationCore:
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    from flows.retrain import NOTHING_NEW, PROMOTED, REFUSED

    ends = ("Completed", "Failed", "Cancelled", "Crashed", NOTHING_NEW, PROMOTED, REFUSED)  # names of final states
    message = f"Nothing was heard of it for {dead_seconds:.0f} s."
    return AutomationCore(
        name=LOST,
        description=f"A run whose process does not say for {dead_seconds:.0f} s that it lives is Crashed.",
        trigger=EventTrigger(
            **_of_ours(),
            posture=Posture.Proactive,
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{name}" for name in ends)},
            threshold=1,
            within=timedelta(seconds=dead_seconds),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=message)],
    )


def _found() -> AutomationCore:
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name=FOUND,
        description="A run that is Crashed and whose process says that it lives is Running.",
        trigger=EventTrigger(
            **_of_ours(),
            posture=Posture.Reactive,
            after={"prefect.flow-run.Crashed"},
            expect={HEARTBEAT},
            threshold=ALIVE_HEARTBEATS,
            within=timedelta(hours=ALIVE_HOURS),
        ),
        actions=[ChangeFlowRunState(state=StateType.RUNNING, message="It is heard of again.")],
    )


def _of_ours() -> dict[str, Any]:
    """Of a trigger: each run of this package by itself."""
    return {
        "match": {"prefect.resource.id": "prefect.flow-run.*"},
        "match_related": {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"},
        "for_each": {"prefect.resource.id"},
    }
