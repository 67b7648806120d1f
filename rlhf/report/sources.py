"""What the page is made of: the sources it is read from, and the sections that a template writes down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from markupsafe import Markup
from pydantic import ValidationError

from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import ArtifactError
from rlhf.runs.records import RunRecord
from rlhf.store.artifacts import JOURNAL, Manifest, Store, read_manifest
from rlhf.store.hashing import MANIFEST
from rlhf.tracking.tracker import Entry, read_journal


@dataclass(frozen=True)
class Sources:
    """Where the figures of a run are.

    ``manifests`` and ``directories`` are of the stages that are done; any may be missing. ``config`` is None where
    the present schema does not read the configuration of an old run. ``verdicts`` is people's (``rlhf sheet``).
    """

    record: RunRecord
    config: PipelineConfig | None
    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    directories: Mapping[str, Path] = field(default_factory=dict)
    verdicts: Path | None = None

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """report.json of the evaluation; empty where there is none."""
        return self.json("evaluate", "report.json")

    def json(self, stage: str, name: str) -> dict[str, Any]:
        """A JSON object that a stage wrote; empty where there is none, or none that can be read."""
        path = self.file(stage, name)
        if path is None:
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def journal(self, stage: str) -> list[Entry]:
        """The curves of a stage; empty where there are none, or none that can be read."""
        path = self.file(stage, JOURNAL)
        try:
            return [] if path is None else list(read_journal(path))
        except (OSError, ArtifactError):
            return []

    def file(self, stage: str, name: str) -> Path | None:
        """A file of a stage's artifact, if it is there."""
        directory = self.directories.get(stage)
        path = None if directory is None else directory / name
        return path if path is not None and path.is_file() else None


def sources_of(record: RunRecord, store: Store) -> Sources:
    """Where the figures of a run are, as far as its artifacts are still what it left."""
    manifests, directories = {}, {}
    for stage, row in record.stages.items():
        directory = store.path(stage, row["key"])
        manifest: Manifest | None
        try:
            manifest = read_manifest(directory / MANIFEST)
        except ArtifactError:
            manifest = store.remembered(stage, row["key"])
        if manifest is None or manifest.digest != row["digest"]:
            continue
        manifests[stage] = manifest
        if directory.is_dir():
            directories[stage] = directory
    try:
        config = PipelineConfig.model_validate(record.config)
    except ValidationError:
        config = None
    return Sources(record, config, manifests, directories, store.home / "verdicts" / f"{record.id}.json")


class Table(NamedTuple):
    """Rows of cells, the first of each being its head; what follows a line break in a cell is written smaller.

    ``texts`` are the columns that hold words, not numbers.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: frozenset[int] = frozenset()


class Figure(NamedTuple):
    """A chart, the tables behind it (none where the section has them open), and what its looks mean.

    ``legend`` has looks and their names; ``keys`` is how they are drawn.
    """

    title: str
    picture: Markup
    tables: Sequence[Table]
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""
    keys: Literal["line", "fill", "dot"] = "line"


class Folded(NamedTuple):
    """What is there for those who ask: tables, charts, or a text of a program."""

    title: str
    tables: Sequence[Table] = ()
    code: str = ""
    figures: Sequence[Figure] = ()


class Section(NamedTuple):
    """A section of the page: what it says, then its tables, its charts, and what is folded away."""

    anchor: str
    title: str
    words: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    folded: Sequence[Folded] = ()
