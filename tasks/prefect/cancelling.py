"""A flow that was cancelled ends as Cancelled.

By itself, Prefect knows of a cancellation only as long as its own handler of SIGTERM is in place. A training replaces
that one for as long as it takes to end its step (``tasks.processes.stopping``), and Prefect would call the run Crashed.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled

from tasks.prefect.server import is_being_cancelled

P = ParamSpec("P")
R = TypeVar("R")


def cancellable(body: Callable[P, R]) -> Callable[P, R]:
    """The body of a flow, which returns the state Cancelled where SIGTERM came of a cancellation."""

    @wraps(body)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return body(*args, **kwargs)
        except TerminationSignal:
            if not is_being_cancelled():
                raise
            return Cancelled(message="It goes on from its last checkpoint when it is run again.")  # type: ignore[return-value]

    return run
