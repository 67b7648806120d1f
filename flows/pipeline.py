"""The pipeline as a Prefect flow: the selected stages in their order, each from the cache or computed.

This module imports neither torch nor MLflow nor TRL; a stage's libraries load when it has to be computed.
"""

import secrets
import time
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

from prefect import flow

from rlhf.artifacts import Store
from rlhf.config import PipelineConfig
from rlhf.locations import home_directory
from rlhf.plan import Planner, Selection
from rlhf.runs import RunRecord
from rlhf.stages import StageName
from tasks import tracking
from tasks.journal import RunJournal
from tasks.mlflow_server import default_uri
from tasks.run import Run, Watcher, current_run
from tasks.shipper import Shipper
from tasks.stages import run_stage

watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def new_run_id() -> str:
    """The id of a run: when it began (UTC), and something random. It sorts by time."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


@flow(name="pipeline", flow_run_name="{config.name}", validate_parameters=True, persist_result=False)
def pipeline(
    config: PipelineConfig,
    only: StageName | None = None,
    from_stage: StageName | None = None,
    until: StageName | None = None,
    refresh: list[StageName] = [],  # noqa: B006, RUF100 - Prefect shows the default in its form
) -> dict[str, Any]:
    """Dataset preparation, SFT, judging, reward model, PPO and evaluation, each from the cache where nothing changed.

    Args:
        config: the whole configuration.
        only: compute this stage anew and nothing else; the stages before it must be cached.
        from_stage: compute this stage and all after it anew; the stages before it must be cached.
        until: nothing after this stage.
        refresh: compute these stages anew, the others as needed.

    Returns:
        The run's id, and per stage its key, digest, whether it came from the cache, seconds and reasons.
    """
    selection = Selection(only, from_stage, until, frozenset(refresh))
    store = Store(home_directory())
    Planner(config, store, selection).plan()  # what cannot be done is refused before anything is recorded
    journal = RunJournal.open(store.home / "runs" / new_run_id())
    run = Run(journal.directory.name, config, store, selection, journal, watcher.get())
    record = RunRecord(
        run.id,
        config.name,
        "running",
        time.time(),
        options={"only": only, "from_stage": from_stage, "until": until, "refresh": refresh},
        config=config.model_dump(mode="json"),
    )
    token = current_run.set(run)
    try:
        with _shipper(run), journal:
            record.write(store.home)
            tracking.begin(run)
            for stage in selection.stages(config):
                record.stages[stage] = _stage(run, stage)
                record.write(store.home)
        record.status = "done"
    except Exception as error:
        record.status, record.error = "failed", str(error)
        raise
    finally:
        if record.status == "running":  # cancelled, or interrupted from the keyboard
            record.status = "interrupted"
        record.ended = time.time()
        record.write(store.home)
        current_run.reset(token)
    return {"run_id": run.id, "stages": record.stages}


def _shipper(run: Run) -> AbstractContextManager[Any]:
    """What carries the run's journal to MLflow while it is written, and waits for the rest at the end."""
    tracking = run.config.tracking
    if not tracking.enabled:
        return nullcontext()
    return Shipper(run.journal.directory, tracking.uri or default_uri(run.store.home))


def _stage(run: Run, stage: str) -> dict[str, Any]:
    """Run one stage, or take it from the cache, and record it."""
    if run.watcher is not None:
        run.watcher.begin(stage)
    plan = run.decide(stage)
    reference = run_stage(plan)
    manifest = run.store.open(stage, reference.key)
    run.manifests[stage] = manifest
    run.store.touch(stage, manifest.key)
    tracking.record(run, stage, manifest)
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
