"""Makes the preferences that the reward model learns from, and measures how far judges agree.

People's pairs are passed on, or something else judges: a weighted sum of reward functions, a function that compares two
responses, or a judge model that learns people's labels first. Judged are the pairs of the data, or samples of the SFT
policy. What is not made here is passed on, so that later stages read preferences and ratings from here alone.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.errors import DataError, RewardError
from rlhf.judge import candidates
from rlhf.judge.judges import Judge, make_judge
from rlhf.prepare.columns import Column, check_names, problems_of
from rlhf.prepare.problems import BadRows
from rlhf.prepare.sources import SPLITS
from rlhf.statistics.agreement import annotators_report, with_people
from rlhf.statistics.intervals import without_nan

if TYPE_CHECKING:
    from rlhf.context import Context

log = logging.getLogger(__name__)


def run(context: Context) -> dict[str, float]:
    """Write ``preferences/`` and ``ratings/``, made here or passed on, and ``report.json``.

    Raises:
        DataError: a column is missing, or holds something that is not a verdict; or nothing could be judged.
        ConfigError: a function cannot be loaded.
        RewardError: a function failed.
        ModelError, TrainingError: of the judge model or the policy that is sampled.
    """
    section, report = context.config.judge, dict[str, Any]()
    people = _people(context)
    if people is not None:
        report = annotators_report(people, section.annotators)
    made: dict[str, Any] = {}
    if section.by != "people":
        judge = make_judge(context)
        groups = {split: candidates.of_split(context, split) for split in SPLITS}
        verdicts = {split: candidates.judged(judge, found) for split, found in groups.items()}
        kind = "ratings" if section.gives == "ratings" else "preferences"
        made = {"by": section.by, "gives": section.gives} | _write(context, kind, verdicts)
        report |= {"made": made} | _agreement(context, judge)
    for kind in ("preferences", "ratings"):
        if not (context.out / kind).exists() and context.has(f"prepare/{kind}"):
            shutil.copytree(context.input(f"prepare/{kind}"), context.out / kind)
    report = without_nan(report)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    (context.out / "report.json").write_text(text + "\n", "utf-8")
    return _finals(report)


def _people(context: Context) -> pa.Table | None:
    """The pairs of the data, whose verdicts are checked; None where it has none."""
    if not context.has("prepare/preferences"):
        return None
    paths = [context.input(f"prepare/preferences/{split}.parquet") for split in SPLITS]
    tables = {path: pq.read_table(path) for path in paths}
    bad = BadRows("judge.annotators")
    section = context.config.judge
    columns = [Column(name, "judge.annotators", "verdict") for name in section.annotators]
    for path, table in tables.items():
        sources = [Column(section.source, "judge.source", "value")] if section.source else []
        check_names(table.column_names, [*columns, *sources], str(path), "judge")
        for column in columns:
            for row, problem in problems_of(table[column.name].to_pylist(), column, cells=False).items():
                bad.add(f"{path} row {row + 1}, column {column.name!r}", problem.words)
    bad.check("Correct these rows, or leave the annotator out.")
    return pa.concat_tables(tables.values(), promote_options="permissive")


def _write(context: Context, kind: str, verdicts: Mapping[str, candidates.Verdicts]) -> dict[str, Any]:
    """Write what was made, one file a split; how much it is, and what made nothing."""
    section, found = context.config.judge, {}
    (context.out / kind).mkdir()
    for split, verdict in verdicts.items():
        table = verdict.ratings() if kind == "ratings" else verdict.pairs(section.gives == "pairs", section.min_margin)
        if split == "train" and not table.num_rows:
            raise DataError(
                f"judge: {len(verdict.groups)} prompts of the training split gave no {kind}, as all responses to each "
                "are blank, the same, or tie; sample more (judge.samples, judge.temperature) or lower judge.min_margin"
            )
        pq.write_table(table, context.out / kind / f"{split}.parquet")
        found[split] = {
            "prompts": len(verdict.groups),
            "responses": sum(len(group.responses) for group in verdict.groups),
            "repeated_or_blank": sum(group.dropped for group in verdict.groups),
            "prompts_without_response": sum(not group.responses for group in verdict.groups),
            kind: table.num_rows,
        }
    return found


def _agreement(context: Context, judge: Judge) -> dict[str, Any]:
    """How the judge's verdicts compare with people's on the test pairs, all and by source.

    What the judge made stands without this: where a function fails on these pairs, as when it takes a column that only
    the prompts have, ``no_agreement`` says why.
    """
    if not context.has("prepare/preferences/test.parquet"):
        return {}
    pairs = pq.read_table(context.input("prepare/preferences/test.parquet"))
    if not pairs.num_rows:
        return {}
    columns = pairs.to_pydict()
    chosen, rejected = columns["chosen"], columns["rejected"]
    try:
        judged = judge.compare(columns["prompt"], chosen, rejected, candidates.others(columns))
    except RewardError as error:
        log.warning("judge: the agreement with people's test pairs is not measured: %s", error)
        return {"no_agreement": str(error)}
    seed, source = context.config.seed, context.config.judge.source
    found = {"with_people": with_people(judged.margins, chosen, rejected, seed) | judged.position_bias()}
    if source:
        rows = np.asarray(columns[source], dtype=object)
        found["by_source"] = {
            str(name): with_people(
                judged.margins[rows == name],
                [text for text, keep in zip(chosen, rows == name, strict=True) if keep],
                [text for text, keep in zip(rejected, rows == name, strict=True) if keep],
                seed,
            )
            for name in sorted(set(columns[source]), key=str)
        }
    return found


def _finals(report: Mapping[str, Any]) -> dict[str, float]:
    finals: dict[str, Any] = {}
    if "pairs" in report:
        finals = {"pairs": report["pairs"], "chosen_longer": report["length"]["chosen_longer"], **report["overall"]}
    for split in ("train", "test"):
        made = report.get("made", {}).get(split, {})
        finals |= {f"{name}_{split}": made[name] for name in ("preferences", "ratings") if name in made}
    finals |= {f"people_{name}": value for name, value in report.get("with_people", {}).items()}
    return {f"judge/{name}": float(value) for name, value in finals.items() if value is not None}
