"""One GPU, two runs: they never train at the same time, none is lost, and a holder that is killed holds up nobody."""

from __future__ import annotations

import json
import time
from itertools import product
from typing import NamedTuple

import pytest

from rlhf.config import PipelineConfig, load
from rlhf.runs.records import read_runs
from tasks.slots import takes_slot
from tests.team.conftest import Up, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Span(NamedTuple):
    """When a stage was computed, in unix seconds."""

    stage: str
    begin: float
    end: float


def demo(seed: int, updates: int) -> PipelineConfig:
    """The demo at its small size, with a seed of its own, so that two have nothing in common."""
    seldom = ["ppo.checkpoint_every=100", "ppo.log_samples_every=100"]
    overrides = [f"seed={seed}", f"ppo.updates={updates}", *seldom, "resources.threads=1"]
    return load("demo", size="smoke", overrides=overrides)


def submit(up: Up, config: PipelineConfig) -> str:
    """Ask for a run; its id."""
    return up.submit("pipeline/demo", config=config.model_dump(mode="json"))


def spans(up: Up, seed: int) -> dict[str, Span]:
    """The stages that the run with a seed has computed, once they had their slot."""
    [record] = [one for one in read_runs(up.home) if one.config["seed"] == seed]
    found = {}
    for stage, row in record.stages.items():
        manifest = json.loads((up.home / "store" / stage / row["key"] / "manifest.json").read_text())
        found[stage] = Span(stage, manifest["started"], manifest["started"] + manifest["seconds"])
    return found


def begun(up: Up, stage: str, among: set[str]) -> str:
    """The name of the folder in which a stage works, as soon as there is one that is not ``among`` others."""

    def find() -> str:
        return next((path.name for path in up.home.glob(f"work/{stage}-*") if path.name not in among), "")

    return str(wait_for(find, f"the begin of {stage}"))


@pytest.mark.parametrize("killed", [False, True])
def test_two_runs_take_turns(up: Up, killed: bool) -> None:
    seeds = (41 + 2 * killed, 42 + 2 * killed)
    others = {path.name for path in up.home.glob("work/*")}
    prepared = set(up.home.glob("store/prepare/*"))
    first = submit(up, demo(seeds[0], updates=100_000))  # more than there is time for
    held = up.home / "work" / begun(up, "ppo", others)
    config = demo(seeds[1], updates=2)
    second = submit(up, config)
    if killed:
        begun(up, "sft", others)  # the second one's: it waits for the slot
        carriers = [one for one in up.tree() if one.environ().get("PREFECT__FLOW_RUN_ID") == first]
        next(one for one in carriers if "prefect.engine" in one.cmdline()).kill()  # the other one sends its journal
        assert up.finish(second) == "COMPLETED"
        assert up.finish(first) == "CRASHED"
        return
    # What needs no slot does not wait for the one that holds it.
    wait_for(lambda: len(set(up.home.glob("store/prepare/*")) - prepared) == 2, "prepare of the second run")
    asked = time.time()
    up.api("POST", f"flow_runs/{first}/set_state", state={"type": "CANCELLING"})
    assert up.finish(first) == "CANCELLED"
    assert up.finish(second) == "COMPLETED"
    ours, theirs = (spans(up, seed) for seed in seeds)
    assert list(ours) == ["prepare", "sft", "judge", "reward"]  # its PPO was under way until it was cancelled
    ours["ppo"] = Span("ppo", ours["reward"].end, max([asked, *(one.stat().st_mtime for one in held.rglob("*"))]))
    holding = [[span for span in run.values() if takes_slot(span.stage, config)] for run in (ours, theirs)]
    assert [len(one) for one in holding] == [3, 4]  # sft, reward and ppo; evaluate, too
    for a, b in product(*holding):
        assert a.end <= b.begin or b.end <= a.begin, (a, b)
    assert ours["ppo"].begin < theirs["prepare"].begin < theirs["prepare"].end < asked
