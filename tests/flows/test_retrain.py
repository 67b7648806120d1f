"""What the gate is shown: the run that has just been made, whatever has become of the data in the meantime."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import retrain
from rlhf import champion
from rlhf.errors import DataError
from rlhf.settings import load


def test_a_candidate_is_the_run_that_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data is moved while it trains: a plan that is made then would fail, or be of another run."""
    plans = [[SimpleNamespace(stage="prepare", ingredients={})]]

    def plan() -> list[SimpleNamespace]:
        if not plans:
            raise DataError("there is no file")
        return plans.pop()

    metrics = {("sft", "k1"): {"sft/loss": 2.0}, ("evaluate", "k2"): {"evaluate/ppo/reward": 0.5}}
    store = SimpleNamespace(home=tmp_path, open=lambda *place: SimpleNamespace(metrics=metrics[place]))
    made = {"run_id": "r1", "stages": {"sft": {"key": "k1"}, "evaluate": {"key": "k2"}}}
    replaced: dict[str, Any] = {
        "open_store": lambda: store,
        "Planner": lambda *_: SimpleNamespace(plan=plan),
        "run_pipeline": lambda *_: made,
        "get_run_logger": lambda: logging.getLogger("flows.retrain"),
        "prefect_ui": SimpleNamespace(show_verdict=lambda *_: None),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(retrain, name, value)
    config = load("demo")
    state = retrain.retrain.fn(config)
    assert state.name == retrain.PROMOTED
    found = champion.read(tmp_path, "candidates", config.name)
    assert found is not None
    assert (found.run_id, found.keys) == ("r1", {"sft": "k1", "evaluate": "k2"})
    assert found.metrics == {"sft/loss": 2.0, "evaluate/ppo/reward": 0.5}
    assert champion.read(tmp_path, "champions", config.name) == found
