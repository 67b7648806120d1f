"""What the tasks of one pipeline run share."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rlhf.cache import Planner, Selection, StagePlan
from rlhf.config import PipelineConfig
from rlhf.store import Manifest, Store
from rlhf.tracking import Entry, Listener, Progress
from tasks.mlflow.journal import RunJournal


class Watcher(Protocol):
    """Someone who follows a run, such as the live display. ``seconds`` is None for a stage from the cache."""

    def begin(self, stage: str) -> None:
        """The stage's turn has come."""

    def watch(self, stage: str, event: Entry | Progress) -> None:
        """A point of a curve, or how far the stage is."""

    def ending(self, stage: str) -> None:
        """The stage has been asked to end, and leaves a checkpoint first. Called by a signal handler."""

    def end(self, stage: str, seconds: float | None) -> None:
        """The stage is done."""


@dataclass
class Run:
    """One run of the pipeline in this process.

    ``computed`` names the stages that this process computed itself; all others came from the cache.
    """

    id: str
    config: PipelineConfig
    store: Store
    selection: Selection
    journal: RunJournal
    watcher: Watcher | None = None
    computed: set[str] = field(default_factory=set)
    plans: dict[str, StagePlan] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)

    def decide(self, stage: str) -> StagePlan:
        """Plan one stage from what the stages before it gave."""
        planner = Planner(self.config, self.store, self.selection)
        self.plans[stage] = planner.decide(stage, self.manifests)
        return self.plans[stage]

    def directory(self, stage: str) -> Path:
        """Where the artifact of a stage that is done lies."""
        return self.store.path(stage, self.manifests[stage].key)

    def listener(self, stage: str) -> Listener:
        """What a stage's tracker tells: to the journal, and to whoever watches."""
        to_journal = self.journal.listener(stage)

        def listen(event: Entry | Progress) -> None:
            to_journal(event)
            if self.watcher is not None:
                self.watcher.watch(stage, event)

        return listen

    def ending(self, stage: str) -> None:
        """Tell whoever watches that a stage has been asked to end."""
        if self.watcher is not None:
            self.watcher.ending(stage)


current_run: ContextVar[Run] = ContextVar("current_run")
