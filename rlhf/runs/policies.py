"""The trained models of a pipeline, found in the store. Nothing is computed, and nothing heavy imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from rlhf.cache.plan import Planner, StagePlan
from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import ArtifactError, ConfigError, NotCachedError
from rlhf.models.dtypes import Dtype
from rlhf.runs.records import read_runs
from rlhf.stages import enabled_stages
from rlhf.store.artifacts import Store

MODELS = {"prepare": "base", "sft": "model", "reward": "model", "ppo": "model"}  # the part of an artifact


class Place(NamedTuple):
    """Where a model is, a local directory or a hub id; and the type that its weights are kept in."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Dtype = "float32"

    @property
    def options(self) -> dict[str, Any]:
        """For the loaders of ``rlhf.models.loading``, without the type, which a tokenizer has not."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


@dataclass
class Trained:
    """Policies by name (``base``, ``sft``, ``ppo``), the reward model, and what there is to say about them."""

    policies: dict[str, Place] = field(default_factory=dict)
    reward_model: Place | None = None
    notes: list[str] = field(default_factory=list)


def of_pipeline(config: PipelineConfig, store: Store) -> Trained:
    """The models of a configuration: those that are up to date, else those of this pipeline's last run, with a note.

    Raises:
        NotCachedError: there is no policy at all.
        InputError: a file or module that the configuration names is missing.
        StorageError: the shared store cannot be read.
    """
    found, notes = {}, []
    for plan in Planner(config, store).plan():
        if not _has_model(plan.stage, config):
            continue
        why = "; ".join(plan.reasons)
        if plan.action == "cached":
            try:
                store.open(plan.stage, str(plan.key))
                found[plan.stage] = store.path(plan.stage, str(plan.key))
                continue
            except ArtifactError as error:  # it was to be fetched from the shared store, and came damaged
                why = f"artifact {error}"
        last = _last(plan, config, store)
        if last is not None:
            found[plan.stage] = last
            notes.append(f"{plan.stage}: not up to date ({why}); this is the one of an earlier run")
        else:
            notes.append(f"{plan.stage}: missing ({why}); `rlhf run --until {plan.stage}` makes it")
    return _trained(config, found, notes)


def of_run(run_id: str, store: Store) -> tuple[PipelineConfig, Trained]:
    """The configuration of a recorded run, and its models.

    Raises:
        ConfigError: there is no such run, or its record is of another version.
        NotCachedError: the store has no policy of it any more.
    """
    records = {record.id: record for record in read_runs(store.home)}
    if run_id not in records:
        close = get_close_matches(run_id, records, n=1, cutoff=0.3) or list(records)[-1:]
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"there is no run {run_id!r} in {store.home / 'runs'}; {hint}`rlhf runs` lists them")
    record = records[run_id]
    try:
        config = PipelineConfig.model_validate(record.config)
    except ValidationError as error:
        raise ConfigError(f"run {run_id!r}: its configuration is one of another version: {error}") from None
    found, notes = {}, []
    for stage in enabled_stages(config):
        if not _has_model(stage, config):
            continue
        try:
            key = record.stages[stage]["key"]
            store.open(stage, key)
            found[stage] = store.path(stage, key)
        except KeyError:
            notes.append(f"{stage}: missing (run {run_id} did not get there)")
        except ArtifactError as error:
            notes.append(f"{stage}: missing (artifact {error})")
    return config, _trained(config, found, notes)


def _trained(config: PipelineConfig, found: dict[str, Path], notes: list[str]) -> Trained:
    """The models in the artifacts of some stages."""
    model = config.model
    places = {
        stage: Place(str(path / MODELS[stage]), trust_remote_code=model.trust_remote_code, dtype=model.dtype)
        for stage, path in found.items()
    }
    if model.path is not None:
        places["prepare"] = Place(model.path, model.revision, model.trust_remote_code, model.dtype)
    names = {"prepare": "base", "sft": "sft", "ppo": "ppo"}
    policies = {name: places[stage] for stage, name in names.items() if stage in places}
    if not policies:
        raise NotCachedError(f"pipeline {config.name!r} has no policy yet: {' '.join(notes)}")
    return Trained(policies, places.get("reward"), notes)


def _has_model(stage: str, config: PipelineConfig) -> bool:
    return stage in MODELS and (stage != "prepare" or config.model.init == "random")


def _last(plan: StagePlan, config: PipelineConfig, store: Store) -> Path | None:
    """The artifact that this pipeline had last, if it is whole."""
    last = store.latest(plan.stage, config.name)
    if last is None:
        return None
    try:
        store.open(last.stage, last.key)
    except ArtifactError:
        return None
    return store.path(last.stage, last.key)
