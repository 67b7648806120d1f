"""What of a pipeline run goes to MLflow, written to the run's journal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.champions import Contender, registered_names
from rlhf.config import PipelineConfig, dump, written
from rlhf.stages import enabled_stages
from rlhf.store import JOURNAL, Manifest
from tasks.mlflow import descriptions
from tasks.mlflow.journal import PARENT
from tasks.run import Run

# The decisions that one compares runs by; the whole configuration is an artifact of the run.
PARAMS = (
    "seed", "model.init", "model.path", "model.architecture", "model.layers", "model.width", "model.lora_rank",
    "sft.enabled", "sft.epochs", "sft.batch_size", "sft.learning_rate",
    "reward.enabled", "reward.path", "reward.epochs", "reward.batch_size", "reward.learning_rate", "reward.center",
    "reward.held_out",
    "ppo.enabled", "ppo.rewards", "ppo.updates", "ppo.episodes", "ppo.epochs", "ppo.minibatches", "ppo.learning_rate",
    "ppo.kl_coef", "ppo.kl_control", "ppo.temperature", "ppo.max_new_tokens", "ppo.clip_range", "ppo.missing_eos",
    "ppo.best_metric",
    "evaluate.prompts", "evaluate.temperature",
)  # fmt: skip

# The columns that the table of runs shows, where they exist: did it get better, by whose judgement, and at what cost.
COLUMNS = (
    "params.ppo.kl_coef", "metrics.evaluate/win_rate/held_out", "metrics.evaluate/win_rate_length_controlled/held_out",
    "metrics.evaluate/ppo/kl", "metrics.evaluate/ppo/reward", "metrics.evaluate/ppo/rougeL",
    "metrics.ppo/overoptimised",
)  # fmt: skip


def begin(run: Run, note: str = "") -> None:
    """Start the parent run: decisions as parameters, the whole configuration as an artifact."""
    run.journal.start(
        run.config.name,
        experiment=run.config.tracking.experiment,
        params={name: _value(run.config, name) for name in PARAMS},
        tags={"rlhf.kind": "pipeline", "rlhf.pipeline": run.config.name},
        note=descriptions.of_run(run.config, link=note),
        columns=COLUMNS,
    )
    run.journal.text(PARENT, "config.yaml", dump(run.config))


def record(run: Run, stage: str, manifest: Manifest) -> None:
    """Add a finished stage: computed in this run, or taken from the cache with its curves as they were."""
    tags = {"rlhf.digest": manifest.digest, "rlhf.seconds": f"{manifest.seconds:.1f}", "rlhf.device": manifest.device}
    if stage in run.computed:
        run.journal.tags(stage, tags)
    else:
        run.journal.start_stage(
            stage,
            tags={"rlhf.stage": stage, "rlhf.cache": "hit", "rlhf.key": manifest.key, **tags},
            computed_by=manifest.run_id or None,
            note=f"It took {manifest.seconds:.0f} s.",
        )
        run.journal.replay(stage, run.directory(stage) / JOURNAL)
    run.journal.finals(stage, manifest.metrics)
    cost = {"seconds": manifest.seconds, **manifest.cost}
    run.journal.finals(stage, {f"cost/{stage}/{name}": value for name, value in cost.items()})
    for name, digest in manifest.ingredients.items():
        if name.startswith("data."):
            run.journal.dataset(stage, name.split(" ", 1)[-1], digest, source=name)
    _files(run, stage, manifest)
    run.journal.end(stage)


def report(run: Run, path: Path) -> None:
    """Keep the report of the whole run."""
    run.journal.artifact(PARENT, path)


def _files(run: Run, stage: str, manifest: Manifest) -> None:
    """Figures, plots, tables and models, by what they are called."""
    directory = run.directory(stage)
    for part, digest in manifest.parts.items():
        path = directory / part
        if part in ("model", "value_model"):
            run.journal.model(stage, f"{stage}-{part}".replace("_", "-"), path, digest, kind=stage)
        elif part == "samples.parquet":
            run.journal.table(stage, path)
        elif part == "plots":
            run.journal.artifact(stage, path, part)
        elif path.suffix == ".json":
            run.journal.artifact(stage, path)
    run.journal.artifact(stage, directory / "manifest.json")


def _value(config: PipelineConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return written(value)


def finish(run: Run, note: str = "") -> None:
    """Say what a run came to, and offer its models as candidates.

    Nothing of a run that did not see all stages of its configuration, or has no evaluation.
    """
    if {*run.manifests} != {*enabled_stages(run.config)} or "evaluate" not in run.manifests:
        return
    metrics = {name: value for manifest in run.manifests.values() for name, value in manifest.metrics.items()}
    run.journal.tags(PARENT, {"mlflow.note.content": descriptions.of_run(run.config, metrics, note)})
    contender = Contender(run.id, {stage: manifest.key for stage, manifest in run.manifests.items()})
    for stage, registered in registered_names(run.config.name, contender).items():
        manifest = run.manifests[stage]
        run.journal.register(
            stage,
            registered,
            name=f"{stage}-model",
            path=run.directory(stage) / "model",
            digest=manifest.parts["model"],
            kind=stage,
            about=descriptions.of_registered(run.config, stage),
            note=descriptions.of_version(run.config, run.id, registered, stage, metrics),
            tags={
                "rlhf.pipeline": run.config.name,
                "rlhf.stage": stage,
                "rlhf.key": manifest.key,
                **descriptions.figures(stage, metrics),
            },
        )
