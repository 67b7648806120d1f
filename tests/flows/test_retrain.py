"""What the gate is shown: the run that has just been made, against the champion of that moment; and a person's word."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Completed

from flows import retrain
from flows.retrain import Approval
from rlhf.champions import ledger as champion
from rlhf.champions.gate import Condition, Figures, Verdict
from rlhf.champions.ledger import Contender
from rlhf.config.pipeline import PipelineConfig
from rlhf.config.yaml_files import load
from rlhf.errors import DataError
from tasks.mlflow import registry

OLD = Contender("old", {"ppo": "o"})
MADE = Contender("r1", {"sft": "k1", "evaluate": "k2"})


class World:
    """What surrounds the flow: nothing is computed, and the gate says what the test wants."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = home
        self.promote = True
        self.during_the_run: Any = lambda: None
        self.seen: list[Contender | None] = []
        plans = [[SimpleNamespace(stage="prepare", ingredients={}, key="p", reasons=("new data",))]]

        def plan() -> list[SimpleNamespace]:
            if not plans:
                raise DataError("there is no file")
            return plans.pop()

        def run_pipeline(*_: Any) -> dict[str, Any]:
            self.during_the_run()
            return {"run_id": MADE.run_id, "stages": {stage: {"key": key} for stage, key in MADE.keys.items()}}

        replaced: dict[str, Any] = {
            "open_store": lambda: SimpleNamespace(home=home),
            "Planner": lambda *_: SimpleNamespace(plan=plan),
            "run_pipeline": run_pipeline,
            "slot_of": lambda *_: nullcontext(),
            "flow_run_alive": lambda *_: nullcontext(),
            "get_run_logger": lambda: logging.getLogger("flows.retrain"),
            "prefect_ui": SimpleNamespace(show_verdict=lambda *_: None),
        }
        for name, value in replaced.items():
            monkeypatch.setattr(retrain, name, value)
        monkeypatch.setattr(registry, "tell", lambda *_: True)
        monkeypatch.setattr("rlhf.champions.contest.hold", self._hold)
        monkeypatch.setattr("rlhf.champions.gate.judged", self._judged)
        monkeypatch.setenv("RLHF_USER", "worker")

    def _hold(self, config: PipelineConfig, store: Any, candidate: Contender, holder: Contender | None) -> Figures:
        assert candidate == MADE
        self.seen.append(holder)
        return Figures("", "", None, 0.0, 0.0)

    def _judged(self, *_: Any) -> Verdict:
        return Verdict((Condition("judge", self.promote, "the judge says so", {}),))

    def run(self, **promotion: Any) -> Any:
        config = load("demo", overrides=[f"promotion.{name}={value}" for name, value in promotion.items()])
        return retrain.retrain.fn(config)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_a_candidate_is_the_run_that_was_made(world: World) -> None:
    """The data is moved while it trains: a plan that is made then would fail, or be of another run."""
    state = world.run()
    assert state.name == retrain.PROMOTED
    assert "the judge says so" in state.message
    found = champion.considered(world.home, "demo")
    assert found is not None
    assert (found.candidate, found.promoted, found.why) == (MADE, True, ("the judge says so",))
    last = champion.history(world.home, "demo").last
    assert last is not None
    assert (last.champion, last.who, last.why) == (MADE, "worker", ("the judge says so",))


def test_the_champion_is_that_of_the_moment_and_not_of_hours_ago(world: World) -> None:
    def someone_promotes() -> None:
        champion.promote(world.home, "demo", OLD, over=None, who="ann", why=())

    world.during_the_run = someone_promotes
    assert world.run().name == retrain.PROMOTED
    assert world.seen == [OLD]
    last = champion.history(world.home, "demo").last
    assert last is not None
    assert last.previous == "old"


def test_a_refusal_changes_no_champion(world: World) -> None:
    champion.promote(world.home, "demo", OLD, over=None, who="ann", why=())
    world.promote = False
    assert world.run().name == retrain.REFUSED
    assert champion.champion(world.home, "demo") == OLD
    found = champion.considered(world.home, "demo")
    assert found is not None
    assert (found.candidate, found.promoted) == (MADE, False)


def test_the_champion_once_more_is_nothing_new(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    champion.promote(world.home, "demo", OLD, over=None, who="ann", why=())
    monkeypatch.setattr("rlhf.champions.contest.hold", lambda *_: None)
    state = world.run()
    assert state.name == retrain.NOTHING_NEW
    assert "the policy of run r1 is that of the champion, run old" in state.message


@pytest.mark.parametrize(
    ("answer", "became", "who", "why"),
    [
        (Approval(promote=True, who="eve", why="read 9"), "Promoted", "eve", "approved by eve in Prefect's UI: read 9"),
        (Approval(promote=True), "Promoted", "a person", "approved by a person in Prefect's UI"),
        (Approval(who="eve", why="rude"), "Refused", None, "refused by eve in Prefect's UI: rude"),
        (Approval(who="nobody"), "Refused", None, "nobody approved it within 2 hours"),
    ],
)  # fmt: skip
def test_a_person_has_the_last_word(
    world: World, monkeypatch: pytest.MonkeyPatch, answer: Approval, became: str, who: str | None, why: str
) -> None:
    asked: dict[str, Any] = {}

    def pause(**options: Any) -> Approval:
        asked.update(options)
        return answer

    monkeypatch.setattr(retrain, "pause_flow_run", pause)
    state = world.run(approval="true", approval_hours=2)
    assert state.name == became
    assert why in state.message
    assert asked["timeout"] == 7200 + retrain.GRACE_SECONDS
    assert "- the judge says so" in asked["wait_for_input"]._description
    last = champion.history(world.home, "demo").last
    assert (last.who if last else None) == who
    found = champion.considered(world.home, "demo")
    assert found is not None
    assert found.why == (why, "the judge says so")


def test_nobody_is_asked_about_what_the_gate_refuses(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrain, "pause_flow_run", lambda **_: pytest.fail("it was asked"))
    world.promote = False
    assert world.run(approval="true").name == retrain.REFUSED


def test_a_champion_that_changed_while_a_person_thought_is_not_overwritten(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pause(**_: Any) -> Approval:
        champion.promote(world.home, "demo", OLD, over=None, who="ann", why=())
        return Approval(promote=True)

    monkeypatch.setattr(retrain, "pause_flow_run", pause)
    with pytest.raises(ValueError, match="the champion of 'demo' is old now"):
        world.run(approval="true")
    assert champion.champion(world.home, "demo") == OLD


def asking(hours: float) -> Any:
    """A flow that asks a person, as retraining does, and ends as it would."""
    config = load("demo", overrides=[f"promotion.approval_hours={hours}"])

    @flow(name=f"asking {hours}", validate_parameters=False)
    def asking() -> Any:
        answer = retrain.ask(config, MADE, ("the judge says so",))
        return Completed(name=retrain.PROMOTED if answer.approved else retrain.REFUSED, message=answer.why)

    return asking


def test_prefect_asks_and_a_person_answers(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrain, "POLL_SECONDS", 0.2)
    ended: list[Any] = []
    thread = threading.Thread(target=lambda: ended.append(asking(1)(return_state=True)))
    thread.start()
    with get_client(sync_client=True) as client:
        while not (paused := [run for run in client.read_flow_runs() if run.state and run.state.is_paused()]):
            assert thread.is_alive()
            time.sleep(0.2)
        answer = client.resume_flow_run(paused[0].id, run_input={"promote": True, "who": "eve", "why": "read 9"})
    assert answer.status.value == "ACCEPT"
    thread.join()
    [state] = ended
    assert (state.name, state.message) == ("Promoted", "approved by eve in Prefect's UI: read 9")


def test_prefect_asks_and_nobody_answers(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrain, "POLL_SECONDS", 0.2)
    state = asking(0.0006)(return_state=True)  # 2 s
    assert (state.name, state.message) == ("Refused", "nobody approved it within 0.0006 hours")
    with get_client(sync_client=True) as client:
        [run] = [run for run in client.read_flow_runs() if run.id == state.state_details.flow_run_id]
    assert run.state is not None
    assert run.state.name == "Refused"
