"""The report of a run: left by each, whatever became of it, and made anew by ``rlhf report``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.report import Sources, files

Rlhf = Callable[..., tuple[int, str, str]]
OFFLINE = ("--set", "tracking.enabled=false")


def reports(home: Path) -> list[Path]:
    """The reports of all runs, oldest first."""
    return sorted((home / "runs").glob("*/report.html"))


def said(out: str) -> Path:
    """Where a run says that its report is."""
    [line] = [line for line in out.splitlines() if line.startswith("Report:")]
    return Path(line.removeprefix("Report:").strip())


def test_a_run_leaves_its_report_and_gives_it_to_its_journal(rlhf: Rlhf, calls: list[str], home: Path) -> None:
    code, out, _ = rlhf("run", *OFFLINE)
    [report] = reports(home)
    assert code == 0
    assert said(out) == report.resolve()
    text = report.read_text(encoding="utf-8")
    assert "<h1>demo</h1>" in text
    assert ">done</span>" in text
    assert all(f'id="curves-{stage}"' in text for stage in ("sft", "reward", "ppo"))
    operations = [json.loads(line) for line in report.with_name("journal.jsonl").read_text().splitlines()]
    kept = [one["run"] for one in operations if one["op"] == "artifact" and one["path"] == str(report.resolve())]
    assert kept == ["pipeline"]


def test_what_is_up_to_date_has_the_report_of_the_run_that_had_it(rlhf: Rlhf, run_once: Path, home: Path) -> None:
    [first] = reports(home)
    rlhf("run", *OFFLINE, "--set", "ppo.kl_coef=0.3")
    assert len(reports(home)) == 2
    assert said(rlhf("run", *OFFLINE)[1]) == first.resolve()
    for report in reports(home):
        report.unlink()
    assert "Report:" not in rlhf("run", *OFFLINE)[1]


def test_a_run_that_failed_has_a_report_of_what_was_done(rlhf: Rlhf, calls: Any, home: Path) -> None:
    calls.fail = "ppo"
    assert rlhf("run", *OFFLINE)[0] == 2
    [report] = reports(home)
    text = report.read_text(encoding="utf-8")
    assert "The run failed before it was evaluated: done are prepare, sft, judge, reward." in text
    assert "ppo was told to fail" in text


def test_a_run_of_which_nothing_was_done_has_none(rlhf: Rlhf, calls: Any, home: Path) -> None:
    calls.fail = "prepare"
    assert rlhf("run", *OFFLINE)[0] == 2
    assert reports(home) == []


def test_what_fails_in_a_report_fails_no_run(
    rlhf: Rlhf, calls: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(sources: Sources) -> str:
        raise ValueError("no page today")

    with monkeypatch.context() as patch:
        patch.setattr(files, "page", fail)
        code, out, _ = rlhf("run", *OFFLINE)
    assert (code, reports(home)) == (0, [])
    assert "Report:" not in out
    assert json.loads(next((home / "runs").glob("*/run.json")).read_text())["status"] == "done"
    code, out, _ = rlhf("report")
    assert (code, Path(out.strip())) == (0, reports(home)[0].resolve())


def test_a_report_is_made_anew_by_run_or_by_pipeline(rlhf: Rlhf, run_once: Path, home: Path) -> None:
    rlhf("run", *OFFLINE, "--set", "ppo.kl_coef=0.3")
    first, last = reports(home)
    before = [report.read_bytes() for report in (first, last)]
    for report in (first, last):
        report.unlink()
    code, out, _ = rlhf("report", first.parent.name, "--json")
    assert (code, json.loads(out)) == (0, {"report": str(first.resolve())})
    assert reports(home) == [first]
    assert rlhf("report", "demo")[0] == 0
    assert [report.read_bytes() for report in (first, last)] == before
    assert b"ppo.kl_coef" in last.read_bytes()


def test_there_must_be_such_a_run(offline_rlhf: Rlhf, stood_in: Path, home: Path) -> None:
    code, _, error = offline_rlhf("report")
    assert code == 2
    assert "there is no run in" in error
    shutil.copytree(stood_in, home)
    code, _, error = offline_rlhf("report", "demmo")
    assert code == 2
    assert "did you mean 'demo'" in error
