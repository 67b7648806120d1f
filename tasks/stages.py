"""One cached Prefect task per stage.

The task's result is a small JSON reference to an artifact. Reading it back verifies the artifact: where that fails,
Prefect counts a cache miss and the stage runs again. Prefect's cache key is ours (``rlhf.cache.plan``), computed before
the task is called, since an error in a cache key function would only be logged and leave the task uncached.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Self, cast

import prefect
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.transactions import BaseTransaction, IsolationLevel
from pydantic import BaseModel, ConfigDict, model_validator

from rlhf.cache import StagePlan
from rlhf.context import Context
from rlhf.errors import ArtifactError, NotCachedError
from rlhf.stages import STAGES, stage_inputs
from rlhf.store import JOURNAL, Manifest, make_manifest
from rlhf.tracking import JournalTracker
from tasks.prefect.lock_manager import FlockLockManager
from tasks.processes import launch, system
from tasks.processes.stopping import gently
from tasks.run import Run, current_run
from tasks.slots import slot

log = logging.getLogger(__name__)


class ArtifactRef(BaseModel):
    """A reference to a stage's artifact. Within a run, reading one verifies the artifact in the run's store.

    Raises:
        ValueError: the artifact is missing or damaged, or is not the one meant.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    key: str
    digest: str

    @model_validator(mode="after")
    def _verified(self) -> Self:
        run = current_run.get(None)
        if run is None:  # someone looks at the record, and computes nothing with it
            return self
        try:
            manifest = run.store.open(self.stage, self.key)
        except ArtifactError as error:
            log.warning("%s/%s cannot be reused: %s", self.stage, self.key, error)  # Prefect says nothing of it
            raise ValueError(str(error)) from None
        if manifest.digest != self.digest:
            raise ValueError(f"{self.stage}/{self.key} has digest {manifest.digest}, not {self.digest}")
        return self


def run_stage(plan: StagePlan) -> ArtifactRef:
    """Run one stage as its Prefect task, or take it from the cache."""
    run = current_run.get()
    refresh = run.selection.computes(plan.stage, run.config)
    policy = CacheKeyFnPolicy(cache_key_fn=_cache_key).configure(
        lock_manager=FlockLockManager(run.store.lock_path("x", "x").parent), isolation_level=IsolationLevel.SERIALIZABLE
    )
    task = TASKS[plan.stage].with_options(
        cache_policy=policy, result_storage=run.store.home / "results", refresh_cache=refresh
    )
    # The task gets what a person wants to see of it in Prefect's UI; the rest comes from the run.
    with _by_itself():
        return task(stage=plan.stage, key=str(plan.key), reasons=list(plan.reasons))


@contextmanager
def _by_itself() -> Iterator[None]:
    """Tasks called in here are in no other task's transaction.

    A task within a task, as in a sweep, would be recorded, and give back its lock, only at the end of the outer one:
    runs that share a stage would go one after the other, and a run that fails would take back what it has computed.
    """
    token = BaseTransaction.__var__.set(cast(BaseTransaction, None))
    try:
        yield
    finally:
        BaseTransaction.__var__.reset(token)


def compute(run: Run, stage: str, key: str) -> ArtifactRef:
    """Compute a stage and publish its artifact; the caller holds the lock of its key.

    An earlier attempt's checkpoints are found again. Nothing is published unless the stage returns. If it cannot be
    sent to the shared store, the run fails, and the next one sends it.

    Raises:
        NotCachedError: the selection wants the stage from the cache, and its artifact cannot be opened.
        StorageError: the shared store cannot be read or written.
    """
    if not run.selection.computes(stage, run.config):
        try:  # computed before, but Prefect's record of it is gone or on another machine
            return _reference(run.store.open(stage, key))
        except ArtifactError as error:
            if run.selection.must_be_cached(stage):  # and the plan found it: what the shared store has is damaged
                raise NotCachedError(
                    f"{stage} must come from the cache, but it cannot be opened ({error}); run it first: "
                    f"rlhf run --until {stage}"
                ) from None
    run.computed.add(stage)
    work = run.store.work_directory(stage, key)
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    listener = run.listener(stage)
    context = Context(
        stage=stage,
        config=run.config,
        inputs={source: run.directory(source) for source in stage_inputs(stage, run.config)},
        out=out,
        checkpoints=work / "checkpoints",
        tracker=JournalTracker(work / JOURNAL, listener),
    )
    context.checkpoints.mkdir(exist_ok=True)
    with slot(run, stage):
        started = time.time()
        run.journal.start_stage(stage, tags={"rlhf.stage": stage, "rlhf.cache": "miss", "rlhf.key": key})
        with system.measured(partial(run.journal.system, stage), _gpus(run, stage)) as cost:
            if STAGES[stage].distributed and launch.is_wanted(run.config.resources):
                metrics = launch.run(context, work / JOURNAL, listener)
            else:
                # What trains ends at a step; the others have nothing to save, and end at once.
                with gently(context.stop, partial(run.ending, stage)) if STAGES[stage].distributed else nullcontext():
                    metrics = importlib.import_module(STAGES[stage].module).run(context)
    if (work / JOURNAL).exists():
        shutil.copy2(work / JOURNAL, out / JOURNAL)  # a copy: a kill before the publishing leaves it for the resumption
    manifest = make_manifest(
        out,
        stage=stage,
        key=key,
        ingredients=dict(run.plans[stage].ingredients),
        pipeline=run.config.name,
        metrics=dict(sorted(metrics.items())),
        run_id=run.id,
        device=_device(run, stage),
        started=started,
        seconds=time.time() - started,
        cost=dict(cost),
    )
    run.store.publish(out, manifest)
    shutil.rmtree(work)
    run.store.send(stage, key)
    return _reference(manifest)


def _task(stage: str) -> prefect.Task[..., ArtifactRef]:
    def body(stage: str, key: str, reasons: list[str]) -> ArtifactRef:
        return compute(current_run.get(), stage, key)

    return prefect.task(
        name=stage, task_run_name=stage, persist_result=True, result_serializer="json", cache_result_in_memory=False
    )(body)


def _cache_key(context: Any, parameters: dict[str, Any]) -> str:
    return f"{parameters['stage']}-{parameters['key']}"


def _reference(manifest: Manifest) -> ArtifactRef:
    return ArtifactRef(stage=manifest.stage, key=manifest.key, digest=manifest.digest)


def _gpus(run: Run, stage: str) -> int:
    """How many GPUs a stage uses at most."""
    resources = run.config.resources
    return 0 if resources.device == "cpu" else resources.processes if STAGES[stage].distributed else 1


def _device(run: Run, stage: str) -> str:
    """What a stage has computed on. A stage that did not need torch does not load it for this, which takes seconds."""
    resources, distributed = run.config.resources, STAGES[stage].distributed
    device = f"cpu ({os.cpu_count()} cores)"
    if resources.device != "cpu" and ("torch" in sys.modules or (distributed and launch.is_wanted(resources))):
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else device
    processes = resources.processes if distributed else 1
    return f"{device}, {processes} processes" if processes > 1 else device


TASKS = {stage: _task(stage) for stage in STAGES}
