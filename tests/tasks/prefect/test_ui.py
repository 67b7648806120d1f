"""What Prefect's UI shows is for people: a run that trained for hours does not fail because it cannot be written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tasks.prefect import ui as prefect_ui

Rlhf = Callable[..., tuple[int, str, str]]


@pytest.fixture(params=[httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), OSError("disk"), ValueError("big")])
def unwritable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A server that takes no artifact; those that it was asked to take."""
    asked: list[str] = []

    def refuse(*_: Any, key: str, **__: Any) -> None:
        asked.append(key)
        raise request.param

    monkeypatch.setattr(prefect_ui.artifacts, "create_markdown_artifact", refuse)
    monkeypatch.setattr(prefect_ui.artifacts, "create_image_artifact", refuse)
    return asked


def test_a_run(unwritable: list[str], rlhf: Rlhf, calls: list[str], home: Path) -> None:
    code, out, _ = rlhf("run", "--set", "tracking.enabled=false")
    assert code == 0
    assert "all stages are up to date" in out
    assert unwritable == ["stages"]  # once: each attempt may take a while
    [run] = (home / "runs").glob("*/run.json")
    assert json.loads(run.read_text())["status"] == "done"


def test_a_plan_and_the_verdict_of_a_retraining(unwritable: list[str]) -> None:
    prefect_ui.show_plan([])
    prefect_ui.show_verdict("Promoted", ["It is better."])
    assert unwritable == ["plan", "retraining"]
