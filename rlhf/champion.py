"""The champion of a pipeline: the run whose policy is in use, and whether another one takes its place.

``<home>/champions/<pipeline>.json`` says which run it is, what its stages were computed from, and what it measured;
``<home>/candidates/<pipeline>.json`` says the same of the last run that was considered, so that a candidate that was
refused is not considered again until something changes.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

from rlhf.artifacts import Store
from rlhf.config import Promotion
from rlhf.errors import ArtifactError
from rlhf.plan import StagePlan, differences

Role = Literal["champions", "candidates"]


@dataclass(frozen=True)
class Contender:
    """A run that is, or wants to be, the champion."""

    run_id: str
    keys: dict[str, str]  # of the artifact of each stage
    metrics: dict[str, float]  # final ones, by name
    when: float = field(default_factory=time.time)  # unix seconds
    why: tuple[str, ...] = ()  # the verdict's reasons


class Verdict(NamedTuple):
    """Whether a candidate takes the champion's place, and why or why not."""

    promote: bool
    reasons: tuple[str, ...]


class Gate(Protocol):
    """Decides between a candidate and the champion; the first candidate has no champion to beat."""

    def __call__(self, candidate: Contender, champion: Contender | None) -> Verdict: ...


def better_by(rule: Promotion) -> Gate:
    """A gate on one metric: the candidate must be better than the champion by more than a margin."""

    def gate(candidate: Contender, champion: Contender | None) -> Verdict:
        value = candidate.metrics.get(rule.metric, math.nan)
        if not math.isfinite(value):
            known = ", ".join(name for name in sorted(candidate.metrics) if name.startswith("evaluate/")) or "none"
            return Verdict(False, (f"{rule.metric} was not measured; promotion.metric may be one of: {known}",))
        if champion is None:
            return Verdict(True, (f"{rule.metric} is {value:.4g}, and there is no champion yet",))
        old = champion.metrics.get(rule.metric, math.nan)
        gain = (old - value) if rule.lower_is_better else (value - old)
        words = f"{rule.metric}: {old:.4g} of the champion, {value:.4g} of the candidate"
        if math.isnan(gain):
            return Verdict(True, (f"{words}; the champion was not measured by it",))
        verb = "is over" if gain > rule.margin else "is not over"
        return Verdict(gain > rule.margin, (f"{words}; the gain {gain:.4g} {verb} the margin {rule.margin:.4g}",))

    return gate


def read(home: Path, role: Role, pipeline: str) -> Contender | None:
    """The champion of a pipeline, or its last candidate; None before there is one.

    Raises:
        ArtifactError: its file is damaged.
    """
    path = _path(home, role, pipeline)
    try:
        found = json.loads(path.read_text("utf-8"))
        return Contender(**found | {"why": tuple(found["why"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete it, and the next run has nothing to beat") from None


def artifacts_in_use(home: Path) -> set[tuple[str, str]]:
    """Stage and key of each artifact of a champion, or of a candidate that was considered last, of any pipeline.

    Raises:
        ArtifactError: a file of theirs is damaged.
    """
    held = [read(home, role, path.stem) for role in get_args(Role) for path in sorted((home / role).glob("*.json"))]
    return {item for contender in held if contender is not None for item in contender.keys.items()}


def write(home: Path, role: Role, pipeline: str, contender: Contender) -> None:
    """Put a contender in this place, in one step."""
    path = _path(home, role, pipeline)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(asdict(contender), indent=1), "utf-8")
    os.replace(temporary, path)


def news(store: Store, before: Contender | None, plans: list[StagePlan]) -> list[str]:
    """What a run by these plans would have that the contender's run had not, a line each; nothing for the same run."""
    if before is None:
        return ["there is no champion yet"]
    lines = []
    for plan in plans:
        key = before.keys.get(plan.stage)
        if key is not None and key == plan.key:
            continue
        then = store.remembered(plan.stage, key) if key else None
        known = _not_inputs(plan.ingredients)
        changes = differences(_not_inputs(then.ingredients), known) if then and known else list(plan.reasons)
        lines += [f"{plan.stage}: {change}" for change in changes]
    gone = before.keys.keys() - {plan.stage for plan in plans}
    return lines + [f"{stage}: is off now" for stage in sorted(gone)]


def _not_inputs(ingredients: Mapping[str, object]) -> dict[str, object]:
    """What a stage has of its own; that its inputs changed is said by the stages that make them."""
    return {name: value for name, value in ingredients.items() if not name.startswith("input ")}


def _path(home: Path, role: Role, pipeline: str) -> Path:
    return home / role / f"{pipeline}.json"
