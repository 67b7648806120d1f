"""The champion of a pipeline: the run whose policy is in use; how it became that, and the way back.

``<home>/champions/<pipeline>.json`` is the truth: every change of the champion, who made it, when and why, and how many
of them the model registry knows. ``<home>/candidates/<pipeline>.json`` says the same of the last run that was
considered, so that a candidate that was refused is not considered again until something changes.
"""

from __future__ import annotations

import getpass
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlhf.cache.plan import StagePlan, differences
from rlhf.errors import ArtifactError, ConfigError
from rlhf.runs.records import RunRecord, read_runs
from rlhf.store.artifacts import Store
from rlhf.store.locks import locked

Event = Literal["promoted", "forced", "rolled back"]
CHAMPION = "champion:"  # before the name of a pipeline, where a run is asked for
USER = "RLHF_USER"  # says who changes a champion, where the user of the system does not, as in a container
T = TypeVar("T")


@dataclass(frozen=True)
class Contender:
    """A run that is, or wants to be, the champion; ``keys`` are those of its stages' artifacts."""

    run_id: str
    keys: dict[str, str]

    @property
    def policy(self) -> tuple[str, str] | None:
        """Stage and key of its last trained policy; None where it has trained none."""
        return next(((stage, self.keys[stage]) for stage in ("ppo", "sft") if stage in self.keys), None)


@dataclass(frozen=True)
class Change:
    """One change of the champion: which run took the place of which other, and who did so when and why."""

    event: Event
    champion: Contender
    previous: str | None  # the run id of the champion before
    who: str
    why: tuple[str, ...]
    when: float = field(default_factory=time.time)  # unix seconds


@dataclass(frozen=True)
class History:
    """All changes of a pipeline's champion, oldest first; the first ``told`` of them are in the model registry."""

    changes: tuple[Change, ...] = ()
    told: int = 0

    @property
    def last(self) -> Change | None:
        """The change that made the present champion; None before there is one."""
        return self.changes[-1] if self.changes else None

    @property
    def line(self) -> tuple[Contender, ...]:
        """The present champion, last, after those that one can go back to one by one."""
        line: list[Contender] = []
        for change in self.changes:
            if change.event == "rolled back":
                line.pop()
            else:
                line.append(change.champion)
        return tuple(line)


@dataclass(frozen=True)
class Considered:
    """The last run that the gate was shown, and what it said; ``told`` is whether the model registry knows."""

    candidate: Contender
    promoted: bool
    why: tuple[str, ...]
    when: float = field(default_factory=time.time)
    told: bool = False


def registered_names(pipeline: str, contender: Contender) -> dict[str, str]:
    """The registered model of each stage of a run whose model is registered: the last policy's, and the reward's."""
    names = {contender.policy[0]: pipeline} if contender.policy else {}
    return names | ({"reward": f"{pipeline}-reward"} if "reward" in contender.keys else {})


# ------------------------------------------------------------------------------------------------------ what there is
def history(home: Path, pipeline: str) -> History:
    """How the champion of a pipeline came to be; empty before there is one.

    Raises:
        ArtifactError: its file is damaged.
    """

    def read(found: Any) -> History:
        changes = tuple(
            Change(**change | {"champion": Contender(**change["champion"]), "why": tuple(change["why"])})
            for change in found["changes"]
        )
        return History(changes, found["told"])

    return _read(home / "champions" / f"{pipeline}.json", read) or History()


def champion(home: Path, pipeline: str) -> Contender | None:
    """The champion of a pipeline; None before there is one. Raises ArtifactError like :func:`history`."""
    last = history(home, pipeline).last
    return last.champion if last else None


def considered(home: Path, pipeline: str) -> Considered | None:
    """The last candidate of a pipeline; None before there is one. Raises ArtifactError like :func:`history`."""

    def read(found: Any) -> Considered:
        return Considered(**found | {"candidate": Contender(**found["candidate"]), "why": tuple(found["why"])})

    return _read(home / "candidates" / f"{pipeline}.json", read)


def pipelines(home: Path) -> list[str]:
    """The pipelines that have a champion, or a candidate that was considered."""
    return sorted({path.stem for role in ("champions", "candidates") for path in (home / role).glob("[!.]*.json")})


def artifacts_in_use(home: Path) -> set[tuple[str, str]]:
    """Stage and key of each artifact of any pipeline's champion, of the one before it, and of the last candidate.

    Raises:
        ArtifactError: a file of theirs is damaged.
    """
    held: list[Contender] = []
    for pipeline in pipelines(home):
        last = considered(home, pipeline)
        held += [*history(home, pipeline).line[-2:], *([last.candidate] if last else [])]
    return {item for contender in held for item in contender.keys.items()}


# --------------------------------------------------------------------------------------------------------- what is done
def promote(
    home: Path,
    pipeline: str,
    contender: Contender,
    *,
    over: Contender | None,
    who: str,
    why: tuple[str, ...],
    forced: bool = False,
) -> Change:
    """Make a run the champion in the place of ``over``, the one that it was compared with.

    Raises:
        ConfigError: another run has become the champion meanwhile.
        ArtifactError: the file is damaged.
    """

    def change(known: History) -> Change:
        present, expected = _id(known), over.run_id if over else None
        if present != expected:
            raise ConfigError(
                f"run {contender.run_id} was compared with {expected or 'no champion'}, but the champion of "
                f"{pipeline!r} is {present} now; compare again: rlhf champion promote {contender.run_id}"
            )
        return Change("forced" if forced else "promoted", contender, present, who, why)

    return _change(home, pipeline, change)


def roll_back(home: Path, pipeline: str, *, who: str, why: tuple[str, ...]) -> Change:
    """Make the champion of before the present one the champion again; done twice, the one before that.

    Raises:
        ConfigError: there is none to go back to.
        ArtifactError: the file is damaged.
    """

    def change(known: History) -> Change:
        if not known.line:
            raise ConfigError(f"pipeline {pipeline!r} has no champion{_others(home, pipeline)}")
        if len(known.line) < 2:
            raise ConfigError(
                f"pipeline {pipeline!r} has had no champion before run {known.line[-1].run_id}; there is nothing to go "
                "back to"
            )
        return Change("rolled back", known.line[-2], _id(known), who, why)

    return _change(home, pipeline, change)


def consider(home: Path, pipeline: str, verdict: Considered) -> None:
    """Remember what the gate said of a candidate."""
    with _locked(home, pipeline):
        _write(home / "candidates" / f"{pipeline}.json", verdict)


def told(home: Path, pipeline: str, *, changes: int | None = None, candidate: str | None = None) -> None:
    """Remember what the model registry knows: so many changes of the champion, the verdict on this run."""
    with _locked(home, pipeline):
        known, last = history(home, pipeline), considered(home, pipeline)
        if changes is not None:
            _write(home / "champions" / f"{pipeline}.json", replace(known, told=changes))
        if last is not None and last.candidate.run_id == candidate:
            _write(home / "candidates" / f"{pipeline}.json", replace(last, told=True))


def person() -> str:
    """Who is at it: ``RLHF_USER``, else the user of the system."""
    try:
        return os.environ.get(USER) or getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"user {os.getuid()}"


# -------------------------------------------------------------------------------------------------------- what is new
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


# --------------------------------------------------------------------------------------------------------------- files
def _change(home: Path, pipeline: str, make: Callable[[History], Change]) -> Change:
    """Add a change, made of what was before, while nobody else does."""
    with _locked(home, pipeline):
        known = history(home, pipeline)
        change = make(known)
        _write(home / "champions" / f"{pipeline}.json", replace(known, changes=(*known.changes, change)))
    return change


def _locked(home: Path, pipeline: str) -> Any:
    return locked(home / "locks" / f"champion-{pipeline}.lock")


def _id(known: History) -> str | None:
    return known.last.champion.run_id if known.last else None


def _others(home: Path, pipeline: str) -> str:
    others = [name for name in pipelines(home) if name != pipeline and history(home, name).last]
    return f"; pipelines that have one: {', '.join(others)}" if others else ""


def _read(path: Path, make: Callable[[Any], T]) -> T | None:
    try:
        return make(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{path} is damaged, or of another version ({error!r}); delete it, and the next run has nothing to beat"
        ) from None


def _write(path: Path, content: History | Considered) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(asdict(content), indent=1), "utf-8")
    os.replace(temporary, path)


def find_run(home: Path, name: str) -> RunRecord:
    """The run that a person means: by its id, ``champion:PIPELINE``, or a pipeline's name, its last finished run.

    Raises:
        ConfigError: there is none.
        ArtifactError: the pipeline's record of its champion is damaged.
    """
    records = read_runs(home)
    wanted = _run_of(home, name.removeprefix(CHAMPION)) if name.startswith(CHAMPION) else name
    for record in reversed(records):
        if record.id == wanted or (record.pipeline == wanted and record.status == "done"):
            return record
    known = {record.id for record in records} | {record.pipeline for record in records if record.status == "done"}
    close = get_close_matches(wanted, sorted(known), n=1, cutoff=0.3)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(
        f"{name!r} is neither a run in {home / 'runs'} nor a pipeline with a finished run; {hint}`rlhf runs` lists them"
    )


def _run_of(home: Path, pipeline: str) -> str:
    found = champion(home, pipeline)
    if found is None:
        raise ConfigError(f"{CHAMPION}{pipeline}: that pipeline has no champion yet")
    return found.run_id
