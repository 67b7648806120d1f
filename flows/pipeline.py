"""The pipeline as Prefect flows: the selected stages in their order, each from the cache or computed.

``pipeline`` takes a whole configuration, ``preset`` the name of one with some settings changed; they do the same. This
module imports neither torch nor MLflow nor TRL; a stage's libraries load when it has to be computed.
"""

import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from prefect import flow, get_run_logger
from pydantic import Field

from flows import promotion
from flows.display import PlainDisplay
from rlhf.cache import Planner, Selection
from rlhf.config import PipelineConfig, load, presets
from rlhf.runs import RunRecord
from rlhf.stages import StageName
from rlhf.store import Store, named_if_full, open_store
from tasks import mlflow_run
from tasks.mlflow.journal import RunJournal
from tasks.mlflow.server import tracking_uri
from tasks.mlflow.shipper import Shipper
from tasks.prefect import ui as prefect_ui
from tasks.prefect.cancelling import cancellable
from tasks.prefect.flow_runs import flow_run_alive
from tasks.prefect.project import enter_project
from tasks.run import Run, Watcher, current_run
from tasks.stages import run_stage

log = logging.getLogger(__name__)
watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)

PresetName = Annotated[str, Field(json_schema_extra={"enum": list(presets())})]
FULL = "full"
NONE: Final = "none"
Choice = Literal[StageName, "none"]  # not an optional one: Prefect's form has a select for this
SizeName = Annotated[
    str, Field(json_schema_extra={"enum": [FULL, *sorted({size for one in presets().values() for size in one.sizes})]})
]


def new_run_id() -> str:
    """The id of a run: when it began (UTC), and something random. It sorts by time."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


@flow(name="pipeline", flow_run_name="{config.name}", validate_parameters=True, persist_result=False)
@cancellable
def pipeline(
    config: PipelineConfig,
    only: Choice = NONE,
    from_stage: Choice = NONE,
    until: Choice = NONE,
    refresh: list[StageName] = [],  # noqa: B006, RUF100 - Prefect shows the default in its form
    dry_run: bool = False,
) -> dict[str, Any]:
    """Dataset preparation, SFT, judging, reward model, PPO and evaluation, each from the cache where nothing changed.

    Args:
        config: The whole configuration.
        only: Compute this stage anew and nothing else; the stages before it must be cached.
        from_stage: Compute this stage and all after it anew; the stages before it must be cached.
        until: Nothing after this stage.
        refresh: Compute these stages anew, the others as needed.
        dry_run: Compute nothing; say what would be computed, and why.

    Returns:
        The run's id, and per stage its key, digest, whether it came from the cache, seconds and reasons.
    """
    enter_project()
    return run_pipeline(config, _selection(only, from_stage, until, refresh), dry_run=dry_run)


@flow(name="preset", flow_run_name="{preset}", validate_parameters=True, persist_result=False)
@cancellable
def preset(
    preset: PresetName = "demo",
    size: SizeName = FULL,
    overrides: list[str] = [],  # noqa: B006, RUF100
    only: Choice = NONE,
    from_stage: Choice = NONE,
    until: Choice = NONE,
    refresh: list[StageName] = [],  # noqa: B006, RUF100
    dry_run: bool = False,
) -> dict[str, Any]:
    """A preset of this package, with some of its settings changed.

    Args:
        preset: Name of the preset.
        size: A size that it offers; `smoke` is a few steps of every stage.
        overrides: Settings that differ from the preset's, such as `ppo.kl_coef=0.1`.
        only: Compute this stage anew and nothing else; the stages before it must be cached.
        from_stage: Compute this stage and all after it anew; the stages before it must be cached.
        until: Nothing after this stage.
        refresh: Compute these stages anew, the others as needed.
        dry_run: Compute nothing; say what would be computed, and why.

    Returns:
        As ``pipeline``.
    """
    enter_project()
    config = load(preset, size=None if size == FULL else size, overrides=overrides)
    return run_pipeline(config, _selection(only, from_stage, until, refresh), dry_run=dry_run)


def _selection(only: Choice, from_stage: Choice, until: Choice, refresh: Sequence[StageName]) -> Selection:
    """What the form of a deployment says."""
    one, first, last = (None if stage == NONE else stage for stage in (only, from_stage, until))
    return Selection(one, first, last, frozenset(refresh))


def run_pipeline(config: PipelineConfig, selection: Selection, *, dry_run: bool = False) -> dict[str, Any]:
    """The body of both flows.

    Raises:
        InputError: the selection, the configuration or the data is wrong; nothing is recorded then.
        StorageError: the disk is full, or the shared store cannot be read or written.
        RlhfError: a stage failed.
    """
    store = open_store()
    with named_if_full(store.home), flow_run_alive(store.home), ExitStack() as stack:
        tracked = config.tracking.enabled and not dry_run
        shipper = stack.enter_context(Shipper(tracking_uri(config.tracking.uri, store.home))) if tracked else None
        plans = Planner(config, store, selection).plan()  # what cannot be done is refused before anything is recorded
        if dry_run:
            prefect_ui.show_plan(plans)
            return {"run_id": None, "stages": {p.stage: {"action": p.action, "why": list(p.reasons)} for p in plans}}
        store.send_unsent()
        return _run(config, store, selection, shipper)


def _run(config: PipelineConfig, store: Store, selection: Selection, shipper: Shipper | None) -> dict[str, Any]:
    """Run the stages, and record the run."""
    journal = RunJournal.open(store.home / "runs" / new_run_id())
    run = Run(journal.directory.name, config, store, selection, journal, watcher.get() or PlainDisplay(_to_log))
    record = RunRecord(
        run.id,
        config.name,
        "running",
        time.time(),
        options={
            "only": selection.only,
            "from_stage": selection.start,
            "until": selection.until,
            "refresh": sorted(selection.refresh),
        },
        config=config.model_dump(mode="json"),
    )
    token = current_run.set(run)
    try:
        shipping = shipper.follow(journal.directory) if shipper else nullcontext()
        with shipping, journal, _reported(run, record), _recorded(record, store.home):
            mlflow_run.begin(run, prefect_ui.flow_run_link())
            for stage in selection.stages(config):
                record.stages[stage] = _stage(run, stage)
                record.write(store.home)
            mlflow_run.finish(run, prefect_ui.flow_run_link())
        promotion.tell(store.home, config)  # what MLflow could not be told before
    finally:
        prefect_ui.show_run(run)
        current_run.reset(token)
    return {"run_id": run.id, "stages": record.stages}


@contextmanager
def _recorded(record: RunRecord, home: Path) -> Iterator[None]:
    """Keep the record of a run up to date, from where it begins to how it ends."""
    record.write(home)
    try:
        yield
        record.status = "done"
    except Exception as error:
        record.status, record.error = "failed", str(error)
        raise
    finally:
        if record.status == "running":  # cancelled, or interrupted from the keyboard
            record.status = "interrupted"
        record.ended = time.time()
        record.write(home)


@contextmanager
def _reported(run: Run, record: RunRecord) -> Iterator[None]:
    """Make the report of a run at its end, also of one that came only so far; what fails in that fails no run."""
    try:
        yield
    finally:
        if record.stages:
            from rlhf.report import write as write_report  # Jinja and more, which comes when it is needed

            try:
                mlflow_run.report(run, write_report(record, run.store))
            except Exception:
                log.exception("the report of run %s could not be made; `rlhf report %s` tries again", run.id, run.id)


def _to_log(line: str) -> None:
    """Say a line in Prefect's log of the flow or task that runs now."""
    get_run_logger().info(line)


def _stage(run: Run, stage: str) -> dict[str, Any]:
    """Run one stage, or take it from the cache, and record it."""
    if run.watcher is not None:
        run.watcher.begin(stage)
    plan = run.decide(stage)
    reference = run_stage(plan)
    manifest = run.store.open(stage, reference.key)
    run.manifests[stage] = manifest
    run.store.touch(stage, manifest.key)
    mlflow_run.record(run, stage, manifest)
    cached = stage not in run.computed
    if run.watcher is not None:
        run.watcher.end(stage, None if cached else manifest.seconds)
    return {
        "key": manifest.key,
        "digest": manifest.digest,
        "cached": cached,
        "seconds": manifest.seconds,
        "reasons": list(plan.reasons),
    }
