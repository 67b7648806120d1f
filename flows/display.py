"""What a person sees of a run: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from rlhf.tracker import Entry, Progress

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_SECONDS = 10.0  # between two plain lines of one stage


class Display(Protocol):
    """Follows a run. ``watch`` gets every point and progress of the stages; the rest is told by the command line."""

    def watch(self, stage: str, event: Entry | Progress) -> None: ...
    def close(self) -> None: ...


class LiveDisplay:
    """One bar per stage with its live numbers, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Bars(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>5.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[live]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._progress.start()

    def watch(self, stage: str, event: Entry | Progress) -> None:
        """Move the stage's bar."""
        if isinstance(event, Entry):
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=event.total, live="")
        self._progress.update(self._tasks[stage], completed=event.done, total=event.total, live=_numbers(event.live))

    def close(self) -> None:
        """Leave the bars as they are."""
        self._progress.stop()


class PlainDisplay:
    """A line per stage every few seconds, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, float] = {}

    def watch(self, stage: str, event: Entry | Progress) -> None:
        """Print the stage's progress now and then, and its end."""
        if isinstance(event, Entry):
            return
        now = time.monotonic()
        if event.done >= event.total or now - self._last.get(stage, 0.0) >= LINE_SECONDS:
            self._last[stage] = now
            self._console.print(
                f"{stage}: {event.done}/{event.total}  {_numbers(event.live)}".rstrip(), highlight=False
            )

    def close(self) -> None:
        """Nothing to end."""


def make_display(console: Console) -> Display:
    """The display that fits where the output goes."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


def _numbers(live: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in live.items())
