"""What happens when something stops: each fault, at three random moments of a run on a real ``rlhf up``.

The seed of the moments is printed, and taken from RLHF_FAULT_SEED if that is set. With RLHF_FAULT_OUTCOMES naming a
file, each outcome is added to it; ``report.py`` makes the table of docs/reliability.md of them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from rlhf.runs.records import read_runs
from tests.faults import workload
from tests.faults.report import Outcome
from tests.team.conftest import Up, started, wait_for
from tests.team.postgres import BIN, Postgres, postgres

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# All processes of one pytest (xdist) have the same.
SEED = int(
    os.environ.get("RLHF_FAULT_SEED") or random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).randrange(10**6)
)
MOMENTS = range(int(os.environ.get("RLHF_FAULT_MOMENTS", "3")))
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
HANG_SECONDS = 20.0


class Bench:
    """An ``rlhf up`` that can be started again, with the run that is disturbed on it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder, self.home, self._arguments = folder, folder / "home", arguments
        self._stack = ExitStack()
        self.database: Postgres | None = None
        workload.write(folder)
        self.start()

    def start(self) -> None:
        """Start it; what ran before has ended."""
        self.up: Up = self._stack.enter_context(started(self.home, *self._arguments))

    def stop(self) -> None:
        """End it, if it has not been ended already."""
        self._stack.close()
        self._stack = ExitStack()

    def submit(self, trial: str, processes: int) -> str:
        """Ask for the run of a trial; its id."""
        return self.up.submit(
            "pipeline/demo", config=workload.config(self.folder, trial, processes).model_dump(mode="json")
        )

    def child(self, *words: str) -> psutil.Process:
        """A program that ``rlhf up`` has started, by words of its command line; as soon as it is there again."""

        def find() -> psutil.Process | None:
            for one in psutil.Process(self.up.process.pid).children():
                with suppress(psutil.Error):
                    if set(words) <= set(one.cmdline()):
                        return one
            return None

        found: psutil.Process = wait_for(find, f"the program {' '.join(words)}")
        return found

    def below_worker(self, is_it: Callable[[psutil.Process], bool]) -> psutil.Process:
        """A process below the worker, as soon as there is one of the kind."""

        def find() -> psutil.Process | None:
            for one in self.child("worker").children(recursive=True):
                with suppress(psutil.Error):
                    if is_it(one):
                        return one
            return None

        found: psutil.Process = wait_for(find, "a process of the run")
        return found

    def left(self) -> list[str]:
        """Processes that work on the home folder, and are neither ``rlhf up`` nor what it keeps running."""
        kept = {one.pid for one in self.up.tree()} - {one.pid for one in self.child("worker").children(recursive=True)}
        found = []
        for one in psutil.process_iter():
            with suppress(psutil.Error):
                if one.environ().get("RLHF_HOME") == str(self.home) and one.pid not in kept:
                    found.append(" ".join(one.cmdline())[:200])
        return found

    def unended(self) -> list[str]:
        """Runs that Prefect does not call ended."""
        rows = self.up.api("POST", "flow_runs/filter", limit=200)
        return [row["name"] for row in rows if row["state_type"] not in (*ENDED, "SCHEDULED")]


def cancel(bench: Bench, run: str) -> None:
    answer = bench.up.api("POST", f"flow_runs/{run}/set_state", state={"type": "CANCELLING"})
    at_once = answer["state"]["type"] == "CANCELLED"  # it had not begun
    assert answer["status"] == "ACCEPT" or at_once, answer


def signalled(find: Callable[[Bench, str], psutil.Process], number: signal.Signals) -> Callable[[Bench, str], None]:
    def fault(bench: Bench, run: str) -> None:
        find(bench, run).send_signal(number)

    return fault


def child(*words: str) -> Callable[[Bench, str], psutil.Process]:
    return lambda bench, run: bench.child(*words)


def carrier(bench: Bench, run: str) -> psutil.Process:
    """The process that carries a flow run."""
    return bench.below_worker(lambda one: any(run in file.path for file in one.open_files()))


def module(name: str) -> Callable[[Bench, str], psutil.Process]:
    """A process that runs a module of ours; the launcher's command line has the name of the ranks' module, too."""
    return lambda bench, run: bench.below_worker(lambda one: ("-m", name) in pairwise(one.cmdline()))


def hanging(*words: str) -> Callable[[Bench, str], None]:
    def fault(bench: Bench, run: str) -> None:
        processes = [bench.child(*words), *bench.child(*words).children(recursive=True)]
        for one in processes:
            one.suspend()
        time.sleep(HANG_SECONDS)
        for one in processes:
            one.resume()

    return fault


def up_ends(number: signal.Signals) -> Callable[[Bench, str], None]:
    def fault(bench: Bench, run: str) -> None:
        bench.up.process.send_signal(number)
        bench.up.process.wait(timeout=120)
        bench.stop()
        bench.start()

    return fault


def postgres_dies(bench: Bench, run: str) -> None:
    assert bench.database is not None
    bench.database.kill()
    time.sleep(3.0)
    bench.database.start()  # as whoever looks after the database does


@dataclass(frozen=True)
class Fault:
    """What is done, and where; ``latest`` is the last moment, as a part of the run's time."""

    what: str
    do: Callable[[Bench, str], None]
    processes: int = 1
    latest: float = 0.9
    postgres: bool = False


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
FAULTS = {
    "cancel": Fault("the run is cancelled in the UI", cancel),
    "flow-term": Fault("SIGTERM of the run's process", signalled(carrier, TERM)),
    "flow-kill": Fault("kill -9 of the run's process", signalled(carrier, KILL)),
    "worker-term": Fault("SIGTERM of the worker", signalled(child("worker"), TERM)),
    "worker-kill": Fault("kill -9 of the worker", signalled(child("worker"), KILL)),
    "prefect-kill": Fault("kill -9 of Prefect's server", signalled(child("prefect", "server"), KILL)),
    "prefect-hangs": Fault(f"Prefect's server hangs for {HANG_SECONDS:.0f} s", hanging("prefect", "server")),
    "mlflow-kill": Fault("kill -9 of MLflow", signalled(child("mlflow"), KILL)),
    "mlflow-hangs": Fault(f"MLflow hangs for {HANG_SECONDS:.0f} s", hanging("mlflow")),
    "up-int": Fault("Ctrl-C in rlhf up", up_ends(INT)),
    "up-kill": Fault("kill -9 of rlhf up", up_ends(KILL)),
    "rank-kill": Fault(
        "kill -9 of one of two training processes",
        signalled(module("tasks.processes.rank"), KILL),
        processes=2,
        latest=0.6,
    ),
    "launcher-kill": Fault(
        "kill -9 of their launcher", signalled(module("tasks.processes.launcher"), KILL), processes=2, latest=0.6
    ),
    "postgres-kill": Fault("kill -9 of PostgreSQL, which is started again", postgres_dies, postgres=True),
}


@dataclass(frozen=True)
class Undisturbed:
    """What a run gives that nobody disturbs, and how long it takes."""

    seconds: float
    weights: str


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[bool], Bench]]:
    """One with SQLite and one with PostgreSQL, when they are asked for."""
    made: dict[bool, Bench] = {}
    with ExitStack() as stack:

        def bench(on_postgres: bool) -> Bench:
            if on_postgres not in made:
                folder = tmp_path_factory.mktemp("postgres" if on_postgres else "sqlite")
                if on_postgres:
                    server = stack.enter_context(postgres())
                    made[True] = Bench(folder, "--database-url", server.url)
                    made[True].database = server
                else:
                    made[False] = Bench(folder)
                stack.callback(made[on_postgres].stop)
            return made[on_postgres]

        yield bench


@pytest.fixture(scope="module")
def undisturbed(benches: Callable[[bool], Bench]) -> Callable[[Fault], Undisturbed]:
    """The run without a fault, once for each kind of bench and number of processes.

    The stages before PPO come from the cache, as in the trials: of a run before it, with as many processes as may be.
    """
    found: dict[tuple[bool, int], Undisturbed] = {}

    def measure(fault: Fault) -> Undisturbed:
        kind = fault.postgres, fault.processes
        if kind not in found:
            bench, trial = benches(fault.postgres), f"undisturbed{fault.processes}"
            if not any(on_postgres == fault.postgres for on_postgres, _ in found):
                assert bench.up.finish(bench.submit("first", fault.processes)) == "COMPLETED"
            began = time.monotonic()
            assert bench.up.finish(bench.submit(trial, fault.processes)) == "COMPLETED"
            found[kind] = Undisturbed(time.monotonic() - began, workload.weights(bench.home, trial))
            assert found[kind].weights
        return found[kind]

    return measure


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", FAULTS)
def test_fault(
    name: str, moment: int, benches: Callable[[bool], Bench], undisturbed: Callable[[Fault], Undisturbed]
) -> None:
    fault = FAULTS[name]
    if fault.postgres and BIN is None:
        pytest.skip("needs PostgreSQL, Debian's package postgresql")
    usual, bench, trial = undisturbed(fault), benches(fault.postgres), f"{name}-{moment}"
    after = random.Random(f"{SEED} {trial}").uniform(0.0, fault.latest) * usual.seconds
    print(f"seed {SEED}: {fault.what}, {after:.1f} s after the run was asked for")

    while True:
        began, run = time.monotonic(), bench.submit(trial, fault.processes)
        time.sleep(after)
        if bench.up.state(run) != "COMPLETED":
            break
        after, trial = after / 2, f"{trial}+"  # it was faster than the undisturbed one
    fault.do(bench, run)
    asked = 1
    while bench.up.finish(run) != "COMPLETED":
        assert asked < 3, f"the same run failed {asked} times: {bench.up.api('GET', f'flow_runs/{run}')['state']}"
        run, asked = bench.submit(trial, fault.processes), asked + 1  # as a person does
    seconds = time.monotonic() - began

    ours = [one for one in read_runs(bench.home) if trial in str(one.config)]
    computed = Counter(stage for one in ours for stage, row in one.stages.items() if not row["cached"])
    calls = Counter(workload.calls(bench.folder, trial))
    with suppress(AssertionError):  # what is left then is in the outcome
        wait_for(lambda: not bench.left() and not bench.unended(), "all to end", seconds=60)
    outcome = Outcome(
        seed=SEED,
        fault=name,
        what=fault.what,
        after=after,
        same_result=workload.weights(bench.home, trial) == usual.weights,
        asked=asked,
        seconds_lost=max(0.0, seconds - usual.seconds),
        stages_twice=sum(count - 1 for count in computed.values()),
        updates_twice=sum(count - 1 for count in calls.values()) // fault.processes,
        processes_left=bench.left(),
        runs_left=bench.unended(),
    )
    print(asdict(outcome))
    if path := os.environ.get("RLHF_FAULT_OUTCOMES"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
    assert outcome.same_result
    assert outcome.stages_twice == 0
    assert outcome.updates_twice <= asked - 1  # at most the one that was under way, which no checkpoint has
    assert outcome.processes_left == outcome.runs_left == []
