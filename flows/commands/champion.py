"""``rlhf champion``: who is in use and why, the gate, and the way back."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.console import Console

from flows import promotion
from flows.commands import options as given
from flows.commands.summary import print_table
from rlhf import champions
from rlhf.champions import Contender
from rlhf.config import PipelineConfig
from rlhf.errors import ArtifactError, ConfigError, did_you_mean
from rlhf.runs import RunRecord, read_runs
from rlhf.stages import enabled_stages
from rlhf.store import Store, open_store
from tasks.mlflow import registry
from tasks.mlflow.server import tracking_uri

if TYPE_CHECKING:
    pass

ABOUT = (
    "Show the champions, why they are that and since when; let the gate decide about a run (promote: exit code 1 if it "
    "refuses); or go back to the champion before (rollback)."
)
USAGE = """rlhf champion [PIPELINE ...]
       rlhf champion promote [RUN|PIPELINE] [--force --why TEXT]
       rlhf champion rollback PIPELINE [--why TEXT]"""
REFUSED = 1  # exit code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.usage = USAGE
    parser.add_argument("words", nargs="*", metavar="PIPELINE", help="pipelines to show; or promote, or rollback")
    parser.add_argument("--force", action="store_true", help="promote without the gate; needs --why, and is recorded")
    parser.add_argument("--why", metavar="TEXT", help="the reason, which is kept")
    given.add_store(parser)
    given.add_json(parser)
    given.add_home(parser)


def command(options: argparse.Namespace, console: Console) -> int:
    """Run the command; the exit code.

    Raises:
        ConfigError: a word or option makes no sense here, or there is no such run, pipeline or champion.
    """
    store = open_store(options.home)
    match options.words:
        case ["promote", *rest] if len(rest) < 2:
            return _promote(store, rest[0] if rest else None, options, console)
        case ["rollback", pipeline]:
            return _roll_back(store, pipeline, options, console)
        case ["rollback" | "promote", *_]:
            raise ConfigError(f"rlhf champion {' '.join(options.words)}: expected\n       {USAGE}")
        case pipelines if options.force or options.why:
            raise ConfigError(f"--force and --why are for promote and rollback, not for {pipelines or 'showing'}")
        case pipelines:
            return _show(store, pipelines, options, console)


def _promote(store: Store, word: str | None, options: argparse.Namespace, console: Console) -> int:
    if options.force and not options.why:
        raise ConfigError("--force goes past the gate, so it needs --why TEXT, which is kept with your name")
    record = _finished(store.home, word)
    config = _config(record)
    candidate = Contender(record.id, {stage: row["key"] for stage, row in record.stages.items()})
    why = (options.why,) if options.why else ()
    who = champions.person()
    if options.force:
        decision = _forced(store, config, candidate, who, why)
    else:
        from tasks.slots import slot_of  # here, as Prefect comes with it

        turn = slot_of(config, store.home, leased="PREFECT_API_URL" in os.environ)
        decision = promotion.decide(store, config, candidate, who=who, why=why, turn=turn)
    if options.json:
        print(json.dumps(_as_json(decision), indent=1))
    else:
        _print(config.name, decision, console)
    return REFUSED if decision.verdict is not None and not decision.promoted else 0


def _forced(
    store: Store, config: PipelineConfig, candidate: Contender, who: str, why: tuple[str, ...]
) -> promotion.Decision:
    holder = champions.champion(store.home, config.name)
    if holder is not None and holder.run_id == candidate.run_id:
        raise ConfigError(f"run {candidate.run_id} is the champion of {config.name!r} already")
    _check_policy(store, candidate)
    champions.promote(store.home, config.name, candidate, over=holder, who=who, why=why, forced=True)
    promotion.tell(store.home, config)
    return promotion.Decision(candidate, holder, None, True, why)


def _check_policy(store: Store, contender: Contender) -> None:
    """See that a policy is there, before it becomes the champion.

    Raises:
        ConfigError: the run has none.
        ArtifactError: it is gone, or damaged.
    """
    if contender.policy is None:
        raise ConfigError(f"run {contender.run_id} has no trained policy that could be the champion")
    try:
        store.open(*contender.policy)
    except ArtifactError as error:
        place = "/".join(contender.policy)
        raise ArtifactError(f"the policy of run {contender.run_id}, {place}, cannot be opened: {error}") from None


def _roll_back(store: Store, pipeline: str, options: argparse.Namespace, console: Console) -> int:
    if options.force:
        raise ConfigError("--force is for promote; nothing keeps a rollback from being done")
    line = champions.history(store.home, pipeline).line
    if len(line) > 1:
        _check_policy(store, line[-2])
    change = champions.roll_back(
        store.home, pipeline, who=champions.person(), why=(options.why,) if options.why else ()
    )
    _tell_later(store.home, pipeline)
    if options.json:
        print(json.dumps(asdict(change), indent=1))
    else:
        _say(console, f"{pipeline}: the champion is run {change.champion.run_id} again; it was {change.previous}")
    return 0


def _show(store: Store, pipelines: Sequence[str], options: argparse.Namespace, console: Console) -> int:
    known = champions.pipelines(store.home)
    for name in pipelines:
        if name not in known:
            raise ConfigError(f"pipeline {name!r} has no champion and no candidate yet{did_you_mean(name, known)}")
    found = {name: _state(store.home, name) for name in pipelines or known}
    for name in found:
        _tell_later(store.home, name)
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    if not found:
        _say(console, "No champion yet: `rlhf champion promote` lets the gate decide about the last finished run")
    for name in found:
        _show_one(store.home, name, console)
    return 0


def _state(home: Path, pipeline: str) -> dict[str, Any]:
    known, last = champions.history(home, pipeline), champions.considered(home, pipeline)
    return {
        "champion": asdict(known.last) if known.last else None,
        "before": [contender.run_id for contender in known.line[:-1]],
        "changes": [asdict(change) for change in known.changes],
        "candidate": asdict(last) if last else None,
    }


def _show_one(home: Path, pipeline: str, console: Console) -> None:
    known, last = champions.history(home, pipeline), champions.considered(home, pipeline)
    console.print(f"\n{pipeline}", style="bold", markup=False, highlight=False)
    if known.last is not None:
        change = known.last
        _say(console, f"  champion   {change.champion.run_id}, {change.event} by {change.who} on {_date(change.when)}")
        for line in change.why:
            _say(console, f"             {line}")
        before = [contender.run_id for contender in known.line[-2:-1]]
        back = f"; rlhf champion rollback {pipeline} goes back to {before[0]}" if before else ""
        _say(console, f"  before     {change.previous or 'none'}{back}")
    if last is not None and (known.last is None or last.candidate != known.last.champion):
        became = "promoted" if last.promoted else "refused"
        _say(console, f"  candidate  {last.candidate.run_id}, {became} on {_date(last.when)}")
        for line in last.why:
            _say(console, f"             {line}")


def _print(pipeline: str, decision: promotion.Decision, console: Console) -> None:
    if decision.verdict is not None:
        rows = [("passed" if one.passed else "FAILED", one.name, one.sentence) for one in decision.verdict.conditions]
        print_table(("", "condition", ""), rows, console)
        for note in decision.verdict.notes:
            _say(console, f"Note: {note}")
    run_id, holder = decision.candidate.run_id, decision.champion
    if decision.promoted:
        _say(console, f"{pipeline}: run {run_id} is the champion now; it was {holder.run_id if holder else 'none'}")
    elif decision.verdict is None:
        _say(console, f"{pipeline}: {decision.reasons[0]}")
    else:
        stays = f"run {holder.run_id} stays the champion" if holder else "there is no champion yet"
        _say(console, f"{pipeline}: run {run_id} is refused, and {stays}; `--force --why TEXT` goes past the gate")


def _as_json(decision: promotion.Decision) -> dict[str, Any]:
    from rlhf.statistics import without_nan

    verdict = decision.verdict
    found: dict[str, Any] = without_nan({
        "run": decision.candidate.run_id,
        "champion": decision.champion.run_id if decision.champion else None,
        "promoted": decision.promoted,
        "conditions": [one._asdict() for one in verdict.conditions] if verdict else [],
        "notes": list(verdict.notes) if verdict else [],
        "reasons": list(decision.reasons),
    })  # fmt: skip
    return found


# ------------------------------------------------------------------------------------------------------------ the runs
def _finished(home: Path, word: str | None) -> RunRecord:
    """The run of an id, or the last finished one of a pipeline, or of all.

    Raises:
        ConfigError: there is none, or it did not come to its evaluation.
    """
    runs = read_runs(home)
    done = [run for run in runs if run.status == "done" and "evaluate" in run.stages]
    named = [run for run in runs if run.id == word]
    if named and named[0] not in done:
        raise ConfigError(
            f"run {word!r} is {named[0].status}, with the stages {', '.join(named[0].stages) or 'none'}; the champion "
            "must be a finished run with an evaluation"
        )
    found = [run for run in done if word in (None, run.id, run.pipeline)]
    if not found:
        known = [name for run in done for name in (run.id, run.pipeline)]
        raise ConfigError(
            f"there is no finished run{f' or pipeline {word!r}' if word else ''} with an evaluation in {home / 'runs'}"
            f"{did_you_mean(word, known) if word else ''}; `rlhf runs` lists them"
        )
    return found[-1]


def _config(record: RunRecord) -> PipelineConfig:
    try:
        config = PipelineConfig.model_validate(record.config)
    except ValidationError as error:
        raise ConfigError(f"run {record.id!r}: its configuration is one of another version: {error}") from None
    if missing := [stage for stage in enabled_stages(config) if stage not in record.stages]:
        raise ConfigError(f"run {record.id!r} did not see {', '.join(missing)}, so that it is not finished")
    return config


def _tell_later(home: Path, pipeline: str) -> None:
    """Tell MLflow what it does not know, where the last run of this pipeline would."""
    if registry.is_told(home, pipeline):
        return
    records = [run for run in read_runs(home) if run.pipeline == pipeline]
    tracking = records[-1].config.get("tracking", {}) if records else {}
    if tracking.get("enabled", True):
        registry.tell(home, pipeline, tracking_uri(tracking.get("uri"), home))


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _date(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
