"""The report of a run of which something is missing: it did not come far, is old, or has lost files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf.report import Sources, sources_of
from rlhf.report.page import page
from rlhf.report.verdict import verdict
from rlhf.store.artifacts import Store
from tests.rlhf import report_sources as made
from tests.rlhf.report_sources import STAGES, Reader


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return made.sources(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("stages", [(), *[STAGES[:n] for n in range(1, 6)], ("prepare", "ppo", "evaluate")])
def test_a_run_that_came_only_so_far_has_a_page(sources: Sources, stages: tuple[str, ...]) -> None:
    record = dataclasses.replace(sources.record, status="failed", error="ppo: it broke")
    some: dict[str, Any] = {
        "manifests": {name: sources.manifests[name] for name in stages},
        "directories": {name: sources.directories[name] for name in stages},
    }
    line = Reader(page(dataclasses.replace(sources, record=record, **some))).line
    assert "ppo: it broke" in line
    if "evaluate" not in stages:
        assert f"The run failed before it was evaluated: done are {', '.join(stages) or 'no stage'}." in line
    assert ("Samples" in line) == ("evaluate" in stages)


@pytest.mark.parametrize("missing", list(made.evaluation()))
def test_a_report_of_an_older_version_has_a_page(tmp_path: Path, missing: str) -> None:
    whole = made.evaluation()
    for report in ({k: v for k, v in whole.items() if k != missing}, whole | {missing: None} if missing in (
        "pairs", "curves", "overoptimisation",
    ) else {missing: whole[missing]}):  # fmt: skip
        assert "Lineage" in Reader(page(made.sources(tmp_path, report))).text  # to the last section


def test_a_report_without_tests_and_judges_has_its_summary(tmp_path: Path) -> None:
    report = json.loads(json.dumps(made.evaluation()))
    for one in report["comparisons"]:
        one.pop("judges")
        one.pop("metrics")
        for of in one["scores"].values():
            for new in ("win_rate_length_controlled", "p", "effect", "ties", "wins", "losses"):
                of.pop(new)
    for of in report["metrics"].values():
        of.get("kl", {}).pop("stderr", None)
    assert (
        "PPO wins against SFT72 % [67, 77]by the held-out reward model"
        in Reader(page(made.sources(tmp_path, report))).line
    )


def test_one_policy_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    report = made.evaluation() | {"comparisons": [], "overoptimisation": None, "kl_reference": "base"}
    report["metrics"] = {"base": {"length_tokens": made.estimate(math.nan, 0.0)}}
    found = verdict(made.sources(tmp_path, report))
    assert "only one policy" in found.sentence
    assert [tile.figure for tile in found.tiles] == ["not measured"]


def test_broken_files_of_a_stage_leave_its_section_out(tmp_path: Path) -> None:
    found = made.sources(tmp_path)
    (found.directories["prepare"] / "report.json").write_text("{not json")
    (found.directories["sft"] / "metrics.jsonl").write_text("not a journal\n")
    (found.directories["reward"] / "calibration.json").write_text("[]")
    text = page(found)
    assert '<section id="data">' not in text
    assert '<section id="curves-sft">' not in text
    assert '<section id="curves-ppo">' in text


def test_over_optimisation_is_shown_without_an_evaluation(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = made.sources(tmp_path)
    columns = {
        "update": [0, 10], "score": [0.0, 1.0], "score_stderr": [0.1, 0.1], "kl": [0.0, 4.0],
        "judge/held_out": [0.0, -1.0], "judge/held_out_stderr": [0.1, 0.1], "overoptimised/held_out": [0.0, 1.0],
    }  # fmt: skip
    pq.write_table(pa.table(columns), found.directories["ppo"] / "evaluations.parquet")
    text = page(dataclasses.replace(found, directories={"ppo": found.directories["ppo"]}))
    assert text.count('class="alarm"') == 2  # where all scores are, and where the held-out one is alone
    assert "104.0002.000" in Reader(text).line  # update, KL, its root


def test_sources_of_a_run_are_what_is_left_of_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = dataclasses.replace(made.sources(tmp_path / "unused").record, stages={})
    for stage, digest in (("prepare", "same"), ("sft", "other"), ("ppo", "gone")):
        out = tmp_path / "out" / stage
        out.mkdir(parents=True)
        manifest = dataclasses.replace(made.manifest(stage), digest=digest if stage != "sft" else "recomputed")
        store.publish(out, manifest)
        record.stages[stage] = {"key": manifest.key, "digest": digest, "cached": False, "seconds": 1.0}
    for file in store.path("ppo", record.stages["ppo"]["key"]).iterdir():
        file.unlink()
    store.path("ppo", record.stages["ppo"]["key"]).rmdir()
    found = sources_of(record, store)
    assert list(found.manifests) == ["prepare", "ppo"]
    assert list(found.directories) == ["prepare"]
    assert found.config == made.config()
    Reader(page(found))
    old = sources_of(dataclasses.replace(record, config={"name": "old", "gone": 1}), store)
    assert old.config is None
    assert "This configuration is of an older version" in Reader(page(old)).line
