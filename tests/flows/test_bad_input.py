"""Bad input through the command line: exit code 2, one clear message, no traceback, nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rlhf.bad_input_cases import CASES
from tests.rlhf.projects import Case

THROUGH_THE_FLOW = [case for case in CASES if case.name.startswith(("json", "csv", "dup", "prompt", "empty"))][:6]


def arguments(case: Case, folder: Path) -> list[str]:
    source, overrides = case.make(folder)
    return [str(source), *(word for override in overrides for word in ("--set", override))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(case: Case, code: int, out: str, error: str) -> None:
    assert code == 2, out + error
    assert error.startswith("rlhf: ")
    assert "Traceback" not in out + error
    for fragment in case.fragments:
        assert fragment in error


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_validate_refuses(case: Case, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.commands.cli import main

    code = main(["validate", *arguments(case, folder)])
    captured = capsys.readouterr()
    check(case, code, captured.out, captured.err)


def test_there_are_at_least_forty_cases() -> None:
    assert len({case.name for case in CASES}) >= 40
    assert len(THROUGH_THE_FLOW) >= 4


@pytest.mark.parametrize("case", THROUGH_THE_FLOW, ids=lambda case: case.name)
def test_a_run_leaves_nothing_behind(case: Case, folder: Path, rlhf: Callable[..., tuple[int, str, str]]) -> None:
    check(case, *rlhf("run", *arguments(case, folder), "--set", "tracking.enabled=false"))
    store = folder / "home" / "store"
    assert not store.exists() or not any(store.rglob("*"))
