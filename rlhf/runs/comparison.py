"""What differs between two runs, and whether their figures differ by more than noise; many runs side by side.

Everything comes from the records of the runs and the manifests of their stages (``rlhf.cache.plan`` says what the
ingredients of a manifest are), and from the evaluation's samples where the store still has them. Nothing is computed
anew. A figure is compared prompt by prompt where both runs evaluated it on the same prompts, else by its two intervals.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlhf.errors import ArtifactError
from rlhf.runs.records import RunRecord
from rlhf.stages import STAGES
from rlhf.statistics.intervals import (
    Estimate,
    Floats,
    bootstrap_interval,
    paired_difference,
    paired_test,
    without_nan,
)
from rlhf.store.artifacts import Manifest, Store

Kind = Literal["config", "data", "code", "models", "libraries", "device", "no number"]
Became = Literal["same", "same result", "different", "only in A", "only in B"]
Test = Literal["prompt by prompt", "by the intervals", "none"]
PARTS: tuple[tuple[str, Kind], ...] = (
    ("config.", "config"), ("code ", "code"), ("function ", "code"), ("library ", "libraries"),
    ("model.path", "models"), ("judge.model.path", "models"), ("reward.path", "models"),
)  # fmt: skip
NO_INTERVAL = "it has no interval"
SHARED = 0.5  # of the smaller run's prompts must be the other's too, for a comparison prompt by prompt


class Side(NamedTuple):
    """A run, the manifests of its stages as far as this machine knows them, and its evaluation's samples."""

    record: RunRecord
    manifests: Mapping[str, Manifest]
    samples: pa.Table | None

    @property
    def metrics(self) -> dict[str, float]:
        """The final figures of all stages."""
        return {name: value for manifest in self.manifests.values() for name, value in manifest.metrics.items()}


class Change(NamedTuple):
    """One thing that differs, with its value in either run (None: it is not there) and the stages that it concerns.

    ``no number`` is a setting on which no number of a stage depends.
    """

    kind: Kind
    name: str
    a: Any
    b: Any
    stages: tuple[str, ...]


class Compared(NamedTuple):
    """A figure of both runs and their difference, b - a; ``p`` and ``effect`` where it was tested prompt by prompt.

    ``noise`` says whether the difference is no more than noise, None where it is not tested; ``note`` says why not.
    """

    name: str
    a: Estimate
    b: Estimate
    difference: Estimate
    test: Test
    noise: bool | None
    p: float = math.nan
    effect: float = math.nan
    note: str = ""


def read(record: RunRecord, store: Store) -> Side:
    """A run with what its stages left. An artifact that is gone, or damaged, is left out."""
    found = {stage: store.remembered(stage, row["key"]) for stage, row in record.stages.items()}
    manifests = {stage: manifest for stage, manifest in found.items() if manifest is not None}
    samples = None
    if "evaluate" in manifests:
        try:
            store.open("evaluate", manifests["evaluate"].key)
            samples = pq.read_table(store.path("evaluate", manifests["evaluate"].key) / "samples.parquet")
        except (ArtifactError, OSError):
            samples = None
    return Side(record, manifests, samples)


# ------------------------------------------------------------------------------------------------------- what differs
def stages(a: Side, b: Side) -> dict[str, Became]:
    """Of each stage of either run, whether both have the very same artifact, the same content made anew, or not."""
    found: dict[str, Became] = {}
    for stage in STAGES:
        one, other = a.record.stages.get(stage), b.record.stages.get(stage)
        if one and other:
            same = "same" if one["key"] == other["key"] else "same result"
            found[stage] = "different" if one["digest"] != other["digest"] else same  # type: ignore[assignment]
        elif one or other:
            found[stage] = "only in A" if one else "only in B"
    return found


def changes(a: Side, b: Side) -> list[Change]:
    """Everything that differs, each once, with the stages that it concerns; consequences (inputs) are left out."""
    concerned: dict[tuple[Kind, str], list[str]] = defaultdict(list)
    values: dict[tuple[Kind, str], tuple[Any, Any]] = {}
    for stage in STAGES:
        if stage in a.manifests and stage in b.manifests:
            for change in _of_stage(a.manifests[stage], b.manifests[stage]):
                concerned[change.kind, change.name].append(stage)
                values[change.kind, change.name] = (change.a, change.b)
    found = [Change(*key, *values[key], tuple(names)) for key, names in concerned.items()]
    known = {change.name for change in found}
    return found + [change for change in _of_config(a, b) if change.name not in known]


def _of_stage(a: Manifest, b: Manifest) -> Iterable[Change]:
    one, other = _ingredients(a), _ingredients(b)
    for key in sorted(one.keys() | other.keys()):
        old, new = one.get(key), other.get(key)
        if (old and old.identity) != (new and new.identity):
            yield Change(*key, old and old.shown, new and new.shown, ())
    if a.device != b.device:
        yield Change("device", "device", a.device, b.device, ())


class _Ingredient(NamedTuple):
    identity: Any
    shown: Any


def _ingredients(manifest: Manifest) -> dict[tuple[Kind, str], _Ingredient]:
    """The ingredients but for inputs, by kind and name. Data is itself under any file name."""
    found: dict[tuple[Kind, str], _Ingredient] = {}
    for name, value in manifest.ingredients.items():
        if place := re.fullmatch(r"data\.(\S+)(?: (.*))?", name):
            shown = value if "@" in str(value) else f"{place[2] or 'rows'} ({str(value)[:8]})"
            found["data", place[1]] = _Ingredient((value,), shown)
            continue
        for prefix, kind in PARTS:
            if name.startswith(prefix):
                short = name if kind == "models" else name.removeprefix(prefix)
                digest = re.fullmatch(r"[0-9a-f]{64}", str(value))
                found[kind, short] = _Ingredient((value,), digest[0][:8] if digest else value)
                break
    return found


def _of_config(a: Side, b: Side) -> Iterable[Change]:
    """Settings that differ and are in no ingredient: of stages that only one run has, or whose manifest is lost; all
    others have no effect on numbers.

    A setting that one of the two runs did not know yet is left out.
    """
    one, other = flat(a.record.config), flat(b.record.config)
    unknown = {stage for stage, became in stages(a, b).items() if became.startswith("only")}
    unknown |= {stage for side in (a, b) for stage in side.record.stages if stage not in side.manifests}
    for name in sorted(one.keys() & other.keys()):
        if one[name] != other[name]:
            stage = name.partition(".")[0]
            concerned = (stage,) if stage in unknown else ()
            yield Change("config" if concerned else "no number", name, one[name], other[name], concerned)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as dotted names."""
    if isinstance(value, Mapping) and value:
        return {key: item for part, inner in value.items() for key, item in flat(inner, f"{name}.{part}").items()}
    return {name.lstrip("."): value}


# ------------------------------------------------------------------------------------------------- more than noise?
def compare(a: Side, b: Side) -> list[Compared]:
    """Every final figure that both runs have: b less a, tested where both measured the same thing in the same way.

    Prompt by prompt: the paired bootstrap interval, and ``rlhf.statistics.intervals.paired_test``. By the intervals:
    the interval of the difference of two independent estimates from their own (Zou and Donner 2008, MOVER), which is
    too wide where the prompts are the same, as for win rates. Both are about these two policies on other prompts of the
    kind, not about what another seed would have trained.
    """
    one, other = a.metrics, b.metrics
    bounds = {f"{name}{end}" for name in one for end in ("_low", "_high")}
    pairing = _pairing(a.samples, b.samples)
    return [_compared(name, a, b, pairing) for name in one if name in other and name not in bounds]


def _compared(name: str, a: Side, b: Side, pairing: tuple[Rows, Rows] | None) -> Compared:
    settings = b.record.config.get("evaluate", {})
    sure = {
        "confidence": settings.get("confidence", 0.95),
        "resamples": settings.get("bootstrap", 1000),
        "seed": b.record.config.get("seed", 0),
    }
    columns = [_column(name, side) for side in (a, b)]
    one, other = (_estimate(name, side, column, sure) for side, column in zip((a, b), columns, strict=True))
    plain = Estimate(other.value - one.value, math.nan, math.nan, min(one.n, other.n))
    if why := _incomparable(name, a, b):
        return Compared(name, one, other, plain, "none", None, note=why)
    if pairing is not None and columns[0] is not None and columns[1] is not None:
        first, second = (column[rows] for column, rows in zip(columns, pairing, strict=True) if column is not None)
        difference = paired_difference(second, first, **sure)
        p, effect = paired_test(second, first, sure["resamples"], sure["seed"])
        if difference.n > 1:
            return Compared(
                name, one, other, difference, "prompt by prompt", bool(p > 1 - sure["confidence"]), p, effect
            )
    if any(math.isnan(bound) for estimate in (one, other) for bound in (estimate.low, estimate.high)):
        return Compared(name, one, other, plain, "none", None, note=NO_INTERVAL)
    difference = _independent(one, other)
    return Compared(name, one, other, difference, "by the intervals", difference.low <= 0 <= difference.high)


def _independent(a: Estimate, b: Estimate) -> Estimate:
    """b - a of two independent estimates, with the interval that follows from theirs (Zou and Donner 2008)."""
    difference = b.value - a.value
    low = difference - math.hypot(b.value - b.low, a.high - a.value)
    high = difference + math.hypot(b.high - b.value, a.value - a.low)
    return Estimate(difference, low, high, min(a.n, b.n))


Rows = NDArray[np.int64]


def _pairing(a: pa.Table | None, b: pa.Table | None) -> tuple[Rows, Rows] | None:
    """The rows of the prompts that both have, with the same references; None if those are too few.

    A prompt that is there several times is paired with itself as often, in the order of the rows.
    """
    if a is None or b is None:
        return None
    one, other = _prompts(a), _prompts(b)
    shared = [key for key in one if key in other]
    if len(shared) < max(2, SHARED * min(len(one), len(other))):
        return None
    return np.array([one[key] for key in shared]), np.array([other[key] for key in shared])


def _prompts(samples: pa.Table) -> dict[tuple[str, int], int]:
    """The row of each prompt with its references, by the text of both and how often it was there before."""
    rows: dict[tuple[str, int], int] = {}
    seen: dict[str, int] = defaultdict(int)
    columns = [samples[name].to_pylist() for name in ("prompt", "reference") if name in samples.column_names]
    for row, fields in enumerate(zip(*columns, strict=True)):
        text = json.dumps(fields)
        rows[text, seen[text]] = row
        seen[text] += 1
    return rows


def _column(name: str, side: Side) -> Floats | None:
    """The values of a figure prompt by prompt (n,), where the samples have them."""
    _, _, column = name.partition("evaluate/")
    column = column.replace("/", "_", 1)
    if side.samples is None or "/" not in name or column not in side.samples.column_names:
        return None
    return np.array(side.samples[column].to_pylist(), dtype=np.float64)


def _estimate(name: str, side: Side, column: Floats | None, sure: Mapping[str, Any]) -> Estimate:
    """A figure with its interval: as it was recorded, else from the samples."""
    metrics = side.metrics
    n = 0 if column is None else int((~np.isnan(column)).sum())
    if f"{name}_low" not in metrics and column is not None:
        return bootstrap_interval(column, **sure)._replace(value=metrics[name])
    return Estimate(metrics[name], metrics.get(f"{name}_low", math.nan), metrics.get(f"{name}_high", math.nan), n)


def _incomparable(name: str, a: Side, b: Side) -> str:
    """Why a figure of the evaluation means something else in either run; empty if it does not."""
    if not name.startswith("evaluate/") or "evaluate" not in a.manifests or "evaluate" not in b.manifests:
        return ""
    score = name.rpartition("/")[2]
    one, other = (_judge(side.manifests["evaluate"].ingredients, score) for side in (a, b))
    if one == other:
        return ""
    return "two reward models" if score in ("reward", "held_out") else f"two functions {score!r}"


def _judge(ingredients: Mapping[str, Any], score: str) -> dict[str, Any]:
    """What of an evaluation's ingredients a score comes from; nothing for what is no score."""
    if score in ("reward", "held_out"):
        return {"model": ingredients.get(f"input reward/{'model' if score == 'reward' else score}")}
    settings = [f"config.evaluate.{part}.{score}" for part in ("scorers", "judges")]
    found = {key: value for key, value in ingredients.items() if key.startswith(tuple(f"{s}." for s in settings))}
    found |= {key: ingredients[key] for key in settings if key in ingredients}
    called = {str(value) for key, value in found.items() if key in settings or key.endswith(".function")}
    code = tuple(f"function {function}: " for function in called)
    return found | {key: value for key, value in ingredients.items() if code and key.startswith(code)}


def as_json(a: Side, b: Side) -> dict[str, Any]:
    """All of it for a program: ``a`` and ``b``, ``stages``, ``changes``, ``figures``; None for NaN."""

    def run(side: Side) -> dict[str, Any]:
        return {name: getattr(side.record, name) for name in ("id", "pipeline", "status", "started")}

    figures = [found._asdict() for found in compare(a, b)]
    for figure in figures:
        figure |= {name: figure[name]._asdict() for name in ("a", "b", "difference")}
    changed = [change._asdict() for change in changes(a, b)]
    plain = {"a": run(a), "b": run(b), "stages": stages(a, b), "changes": changed, "figures": figures}
    return dict(without_nan(plain))


# ------------------------------------------------------------------------------------------------- many runs at once
class Row(NamedTuple):
    """A run in a table of many: its settings that are not the same in all, and its final figures."""

    record: RunRecord
    settings: dict[str, Any]
    metrics: dict[str, float]


def side_by_side(sides: Sequence[Side]) -> list[Row]:
    """One row a run. A setting counts if a number depends on it, and it is not the same in all runs that have it."""
    settings = [
        {
            key: value.shown
            for manifest in side.manifests.values()
            for (kind, key), value in _ingredients(manifest).items()
            if kind in ("config", "data")
        }
        for side in sides
    ]
    texts: dict[str, set[str]] = defaultdict(set)
    for one in settings:
        for name, value in one.items():
            texts[name].add(json.dumps(value))
    varying = sorted(name for name, values in texts.items() if len(values) > 1)
    return [
        Row(side.record, {name: one[name] for name in varying if name in one}, side.metrics)
        for side, one in zip(sides, settings, strict=True)
    ]
