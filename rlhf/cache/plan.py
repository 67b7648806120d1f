"""What a run would do and why, found out without running anything and without importing anything heavy.

The cache key of a stage is the sha256 of its *ingredients*, a flat table: config values, digests of the inputs it
reads, fingerprints of the code that it imports and of the user's own functions, digests of the user's data and
model files, versions of the libraries that shape its numbers. Two tables that differ say why a stage runs again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue

from rlhf.cache import fingerprint
from rlhf.cache.fingerprint import PACKAGE, ROOT, code_fingerprint, function_file, import_closure
from rlhf.config.accelerate_file import check_file
from rlhf.config.data import KINDS
from rlhf.config.fields import FunctionSpec, Section
from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import ArtifactError, ConfigError, NotCachedError
from rlhf.prepare.sources import Source, sources
from rlhf.rewards.registry import find, is_builtin
from rlhf.stages import STAGES, StageName, enabled_stages, reads_base, stage_inputs, stage_modules
from rlhf.store.artifacts import FileHashes, Manifest, Store
from rlhf.store.disk import size
from rlhf.store.locations import expanded, named_by_argument

NEVER_RUN = "never run"
FUNCTIONS = {  # the settings by which a stage names the functions that it calls
    "judge": ("judge.rewards",),
    "ppo": ("ppo.rewards", "ppo.judges"),
    "evaluate": ("evaluate.scorers", "ppo.rewards"),
}
CODE = "code.json"  # in the home folder: what is known of code, so that a plan need not parse it
KEY_LENGTH = 32  # hexadecimal digits: 128 bits


@dataclass(frozen=True)
class Selection:
    """Which stages a run computes.

    ``only``: that stage anew and nothing else; what it reads must be cached. ``start`` (``--from``): that stage and
    all after it anew; what comes before must be cached. ``until``: nothing after that stage. ``refresh``: these
    stages anew, the others as needed.
    """

    only: StageName | None = None
    start: StageName | None = None
    until: StageName | None = None
    refresh: frozenset[StageName] = frozenset()

    def stages(self, config: PipelineConfig) -> tuple[str, ...]:
        """The stages that the run looks at, in their order.

        Raises:
            ConfigError: an option names a stage that is off, or the options exclude each other.
        """
        on = enabled_stages(config)
        asked = [("--only", self.only), ("--from", self.start), ("--until", self.until)]
        asked += [("--refresh", name) for name in sorted(self.refresh)]
        for option, name in asked:
            if name is not None and name not in on:
                raise ConfigError(f"{option} {name}: that stage is off in this configuration; on are: {', '.join(on)}")
        if self.only and (self.start or self.until):
            raise ConfigError("--only cannot be combined with --from or --until; it already names the one stage to run")
        last = self.only or self.until or on[-1]
        if self.start and on.index(self.start) > on.index(last):
            raise ConfigError(f"--from {self.start} comes after --until {last}")
        return on[: on.index(last) + 1]

    def computes(self, stage: str, config: PipelineConfig) -> bool:
        """Whether the stage is to be computed even if it is cached."""
        order = list(STAGES)
        return (
            stage in self.refresh
            or stage == self.only
            or (self.start is not None and order.index(stage) >= order.index(self.start))
        )

    def must_be_cached(self, stage: str) -> bool:
        """Whether the run may not compute the stage."""
        order = list(STAGES)
        first = self.only or self.start
        return first is not None and order.index(stage) < order.index(first) and stage not in self.refresh


@dataclass(frozen=True)
class StagePlan:
    """What a run would do with one stage. ``key`` is None while an input is not known yet."""

    stage: str
    action: Literal["cached", "run"]
    reasons: tuple[str, ...] = ()
    key: str | None = None
    manifest: Manifest | None = None  # of the cached artifact; or what a computation is expected to give
    ingredients: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""  # where the cached artifact has to be fetched from; empty if it is here


class Planner:
    """Computes keys and decides, stage by stage, what is cached."""

    def __init__(self, config: PipelineConfig, store: Store, selection: Selection | None = None) -> None:
        self.config = config
        self.store = store
        self.selection = selection or Selection()
        self._hashes = FileHashes(store.home)

    def plan(self) -> list[StagePlan]:
        """The plan of every selected stage.

        A stage whose artifact is damaged but whose digest is on record is expected to come out the same, so that
        what follows it can still be cached.

        Raises:
            NotCachedError: the selection wants a stage from the cache and it is not there.
            InputError: a file or module that the configuration names is missing, or cannot be used.
        """
        check_file(self.config.resources)
        fingerprint.recall(self.store.home / CODE)
        plans: dict[str, StagePlan] = {}
        for stage in self.selection.stages(self.config):
            known = {name: plan.manifest for name, plan in plans.items() if plan.manifest is not None}
            unknown = [source for source in stage_inputs(stage, self.config) if source not in known]
            if unknown:
                made_anew = [f"input {source}: will be made anew" for source in unknown]
                why = [
                    line for line in self._why(stage, self.ingredients(stage, known)) if not line.startswith("input ")
                ]
                plans[stage] = StagePlan(stage, "run", tuple(why if why == [NEVER_RUN] else [*made_anew, *why]))
            else:
                plans[stage] = self.decide(stage, known)
            if plans[stage].action == "run" and self.selection.must_be_cached(stage):
                raise NotCachedError(
                    f"{stage} must come from the cache, but it is not there ({'; '.join(plans[stage].reasons)}); "
                    f"run it first: rlhf run --until {stage}"
                )
        self._hashes.save()
        fingerprint.remember(self.store.home / CODE)
        return list(plans.values())

    def decide(self, stage: str, outputs: Mapping[str, Manifest]) -> StagePlan:
        """Whether one stage is cached, given the manifests of the stages before it."""
        ingredients = self.ingredients(stage, outputs)
        key = key_of(ingredients)
        expected = self.store.remembered(stage, key)
        if self.selection.computes(stage, self.config):
            return StagePlan(stage, "run", ("asked for",), key, expected, ingredients)
        try:
            found = self.store.find(stage, key)
            fetch = (f"{size(found.manifest.size)} to fetch from {found.place}",) if found.place else ()
            return StagePlan(stage, "cached", fetch, key, found.manifest, ingredients, found.place)
        except ArtifactError as error:
            # Without a record of this key, the pipeline never had it; with one, its artifact went or was damaged.
            reasons = (f"artifact {error}",) if expected else tuple(self._why(stage, ingredients))
            return StagePlan(stage, "run", reasons, key, expected, ingredients)

    def ingredients(self, stage: str, outputs: Mapping[str, Manifest]) -> dict[str, Any]:
        """The flat table that the key of a stage is made of."""
        spec = STAGES[stage]
        table: dict[str, Any] = {"stage": stage, "config.seed": self.config.seed}
        for setting in spec.settings:
            table.update(_flatten(f"config.{setting}", _setting(self.config, setting)))
        for source, parts in stage_inputs(stage, self.config).items():
            for part in parts:
                if source in outputs and part in outputs[source].parts:
                    table[f"input {source}/{part}"] = outputs[source].parts[part]
        for module in stage_modules(stage, self.config):
            for path in import_closure(module).values():
                table[f"code {_shown(path)}"] = code_fingerprint(path)
        for name, called in self._functions(stage).items():
            table.update(_code_of(called.function))
            for argument, value in called.arguments.items():
                table.update(self._argument(called.function, f"{name}.arguments.{argument}", value))
        if stage == "prepare":
            table.update(self._data_files())
            if len(self.config.data.computed) > 1:  # a later one may read an earlier one
                table["config.data.computed, in order"] = list(self.config.data.computed)
            for made in self.config.data.computed.values():
                table.update(_code_of(made.function) if ":" in made.function else {})
                table.update({f"library {name}": _version(name) for name in made.libraries})
        judge = self.config.judge
        if stage == "judge" and judge.function:
            table.update(_code_of(judge.function))
        if stage == "evaluate":
            for function in self.config.evaluate.judges.values():
                table.update(_code_of(function))
        if stage == "judge" and judge.by == "model" and judge.model.path:
            table["judge.model.path"] = self._model("judge.model.path", judge.model.path, None)
        if self.config.model.path and reads_base(stage, self.config):
            table["model.path"] = self._model("model.path", self.config.model.path, self.config.model.revision)
        if stage == "reward" and self.config.reward.path:
            table["reward.path"] = self._model("reward.path", self.config.reward.path, None)
        table.update({f"library {name}": _version(name) for name in spec.libraries})
        return table

    def _why(self, stage: str, ingredients: Mapping[str, Any]) -> list[str]:
        """Why a stage is not cached: what differs from the last time this pipeline had it."""
        last = self.store.latest(stage, self.config.name)
        return [NEVER_RUN] if last is None else differences(last.ingredients, ingredients)

    def _functions(self, stage: str) -> dict[str, FunctionSpec]:
        """The functions that a stage calls, by the setting that names them; not the trained reward model."""
        found: dict[str, FunctionSpec] = {}
        for setting in FUNCTIONS.get(stage, ()):
            entries: Mapping[str, FunctionSpec] = _setting(self.config, setting)
            found |= {f"config.{setting}.{name}": spec for name, spec in entries.items() if spec.function != "model"}
        return found

    def _argument(self, function: str, name: str, value: JsonValue) -> dict[str, JsonValue]:
        """What takes the place of an argument in the table: a file or folder counts by content, a hub model by commit.

        Raises:
            ModelError: a built-in's model is nowhere.
        """
        if is_builtin(function) and name.endswith(".model") and isinstance(value, str):
            return {name: self._model(name.removeprefix("config."), value, None)}
        items = value if isinstance(value, list) else [value]
        found = [named_by_argument(item, Path.cwd()) if isinstance(item, str) else None for item in items]
        if not any(found):
            return {}
        content = [self._hashes.of(path) if path else item for path, item in zip(found, items, strict=True)]
        return {name: content if isinstance(value, list) else content[0]}

    def _data_files(self) -> dict[str, str]:
        """Digest of every data file by the field that names it: its folder may change, its content may not."""
        table = {}
        for kind in KINDS:
            for index, source in enumerate(sources(getattr(self.config.data, kind), f"data.{kind}")):
                name = source.place.name if isinstance(source.place, Path) else source.shown
                split = f"#{source.split}" if source.split else ""
                table[f"data.{kind}[{index}] {name}{split}"] = self._source(source, f"data.{kind}")
        if self.config.data.rows:
            text = json.dumps(self.config.data.rows, sort_keys=True)
            table["data.rows"] = hashlib.sha256(text.encode()).hexdigest()
        return table

    def _source(self, source: Source, option: str) -> str:
        """The digest of a file, or the resolved commit of a dataset of the hub."""
        if isinstance(source.place, Path):
            return self._hashes.of(source.place)
        from rlhf.store.hub import resolve_commit

        dataset = source.place
        commit = resolve_commit(dataset.name, dataset.revision, option, "dataset")
        return f"{dataset.name}@{commit} {dataset.config or ''} {dataset.split}"

    def _model(self, option: str, path: str, revision: str | None) -> str:
        """What identifies the model that an option names: the digest of a directory, or the commit of a hub model."""
        local = expanded(path, option)
        if local.is_dir():
            return self._hashes.of(local)
        from rlhf.store.hub import resolve_commit

        return f"{path}@{resolve_commit(path, revision, option)}"


def key_of(ingredients: Mapping[str, Any]) -> str:
    """The cache key of a stage: the first 128 bits of the sha256 of its ingredients, in hexadecimal."""
    canonical = json.dumps(ingredients, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:KEY_LENGTH]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two tables of ingredients, one line for each, in words."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            lines.append(f"{name}: new")
        elif name not in new:
            lines.append(f"{name}: gone")
        elif old[name] != new[name]:
            if name.startswith(("code ", "function ")):
                lines.append(f"{name} changed")
            elif name.startswith(("input ", "data.", "model.path", "reward.path")):
                lines.append(f"{name}: {old[name][-64:][:4]}.. -> {new[name][-64:][:4]}..")
            else:
                lines.append(f"{name}: {old[name]} -> {new[name]}")
    return lines


def _setting(config: PipelineConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _flatten(name: str, value: Any) -> dict[str, Any]:
    """A setting as flat values; fields that do not shape numbers are left out."""
    if isinstance(value, Section):
        table: dict[str, Any] = {}
        for key, info in type(value).model_fields.items():
            extra = info.json_schema_extra
            if isinstance(extra, dict) and extra.get("in_cache_key") is False:
                continue
            table.update(_flatten(f"{name}.{key}", getattr(value, key)))
        return table
    if isinstance(value, Mapping):
        parts = [_flatten(f"{name}.{key}", item) for key, item in sorted(value.items())]
        return {key: item for part in parts for key, item in part.items()} or {name: {}}
    return {name: list(value) if isinstance(value, Collection) and not isinstance(value, str) else value}


def _code_of(function: str) -> dict[str, str]:
    """Ingredients of a built-in, or of a function named by module or file: its code, and a built-in's libraries.

    Raises:
        ConfigError: there is no such file or module.
    """
    builtin = find(function) if is_builtin(function) else None
    reference = builtin.reference if builtin else function
    path = function_file(reference)
    files = {path.name: path}
    if reference.startswith(f"{PACKAGE}."):
        files = {_shown(file): file for file in import_closure(reference.partition(":")[0]).values()}
    table = {f"function {function}: {name}": code_fingerprint(file) for name, file in files.items()}
    return table | {f"library {name}": _version(name) for name in (builtin.libraries if builtin else ())}


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
