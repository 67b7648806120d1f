"""The end of ``rlhf up``, whatever brings it: nothing is left behind, and what waited begins with the next one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from flows.team.reaper import PAUSED
from tests.team.conftest import Up, started, wait_for
from tests.team.test_up import SMOKE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SLOW = """\
import time
from pathlib import Path

def slow(prompts, responses):
    Path(__file__).with_name("asleep").touch()
    time.sleep(8)
    return [0.0] * len(prompts)
"""


class Again:
    """An ``rlhf up`` that is started again on the same home folder once it has ended."""

    def __init__(self, home: Path) -> None:
        self._home, self._stack = home, ExitStack()
        self._up: Up | None = None

    def up(self) -> Up:
        """The one that is there; another one if that has ended."""
        if self._up is None or self._up.process.poll() is not None:
            self.stop()
            self._up = self._stack.enter_context(started(self._home, "--runs", "2"))
        return self._up

    def stop(self) -> None:
        """End it, if it has not ended."""
        self._stack.close()


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Again]:
    """One for all signals: the next test goes on with what was started again after the last one."""
    found = Again(tmp_path_factory.mktemp("end") / "home")
    yield found
    found.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left(again: Again, number: signal.Signals) -> None:
    """Whatever ends it: no process stays, and no run stays Running, at the latest when it is started again.

    A run that waits does not begin while the others end, but then; unless a person has paused the pool.
    """
    first = again.up()
    (first.project / "slow.py").write_text(SLOW)
    asleep = first.project / "asleep"
    before = {*first.home.glob("work/ppo-*")}
    changes = ["ppo.updates=2000", "ppo.checkpoint_every=1", "ppo.rewards={slow.py:slow: 1.0}"]
    changes += ["resources.threads=1", f"ppo.kl_coef=0.{number:d}"]  # a PPO of its own, and the rest from the cache
    slow = first.submit("preset/run", **SMOKE | {"overrides": changes})
    [work] = wait_for(lambda: {*first.home.glob("work/ppo-*")} - before, "the begin of ppo")
    wait_for(lambda: list(work.glob("checkpoints/checkpoint-*")), "a checkpoint of ppo")
    quick = first.submit("preset/run", **SMOKE | {"overrides": ["resources.threads=1", f"seed={number:d}"]})
    wait_for(lambda: first.state(quick) == "RUNNING", "a run that waits for the slot, and ends at once")
    waits = first.submit("preset/run", **SMOKE | {"dry_run": True})
    if number != signal.SIGINT:  # by a person; and at SIGKILL as if by one that was just stopping
        first.api("PATCH", "work_pools/rlhf", is_paused=True)
    if number == signal.SIGKILL:
        (first.home / PAUSED).touch()
    asleep.unlink()
    wait_for(asleep.exists, "a step that takes a while to end")
    everyone = first.tree()
    first.process.send_signal(number)
    _, alive = psutil.wait_procs(everyone, timeout=90)
    assert not alive
    stopped = datetime.now(UTC)

    second = again.up()
    assert second.process.pid != first.process.pid
    ended = "CRASHED" if number == signal.SIGKILL else "CANCELLED"
    assert (second.state(slow), second.state(quick)) == (ended, ended)
    assert not (second.home / PAUSED).exists()
    assert second.api("GET", "work_pools/rlhf")["is_paused"] == (number == signal.SIGTERM)
    second.api("PATCH", "work_pools/rlhf", is_paused=False)
    assert second.finish(waits) == "COMPLETED"
    assert datetime.fromisoformat(second.api("GET", f"flow_runs/{waits}")["start_time"]) > stopped
