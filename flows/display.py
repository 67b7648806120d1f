"""What a person sees of a run: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress as Bars, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from rlhf.runs import duration
from rlhf.tracking import Entry, Progress

LINE_SECONDS = 10.0  # between two plain lines of one stage
ENDING = "ends at the next step, with a checkpoint; a second Ctrl-C ends it at once"


class Display(Protocol):
    """Follows a run: a watcher (``tasks.run``) that can be closed."""

    def begin(self, stage: str) -> None: ...
    def watch(self, stage: str, event: Entry | Progress) -> None: ...
    def ending(self, stage: str) -> None: ...
    def end(self, stage: str, seconds: float | None) -> None: ...
    def close(self) -> None: ...


class LiveDisplay:
    """One bar per stage with its live numbers, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[live]}"),
            console=console,
        )
        self._stages: dict[str, TaskID] = {}
        self._bars.start()

    def begin(self, stage: str) -> None:
        """Add the stage's bar; it pulses until the stage says how far it is."""
        self._stages[stage] = self._bars.add_task(stage, total=None, live="")

    def watch(self, stage: str, event: Entry | Progress) -> None:
        """Move the stage's bar."""
        if isinstance(event, Progress):
            live = f"{event.done}/{event.total}  {_numbers(event.live)}"
            self._bars.update(self._stages[stage], completed=event.done, total=event.total, live=live)

    def ending(self, stage: str) -> None:
        """Say what is waited for."""
        self._bars.update(self._stages[stage], live=ENDING)

    def end(self, stage: str, seconds: float | None) -> None:
        """Fill the bar; the last numbers stay."""
        task = self._stages[stage]
        if seconds is None:
            self._bars.update(task, live="from the cache")
        self._bars.update(task, completed=1, total=1)

    def close(self) -> None:
        """Leave the bars as they are."""
        self._bars.stop()


class PlainDisplay:
    """A line now and then, for logs and pipes, given to ``say``."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last = 0.0

    def begin(self, stage: str) -> None:
        """The first line of a stage comes after ``LINE_SECONDS``."""
        self._last = time.monotonic()

    def watch(self, stage: str, event: Entry | Progress) -> None:
        """Say how far the stage is, now and then."""
        if isinstance(event, Progress) and time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            self._say(f"{stage}: {event.done}/{event.total}  {_numbers(event.live)}".rstrip())

    def ending(self, stage: str) -> None:
        """Say what is waited for."""
        self._say(f"{stage}: {ENDING}")

    def end(self, stage: str, seconds: float | None) -> None:
        """Say that the stage is done."""
        self._say(f"{stage}: {'from the cache' if seconds is None else f'done in {duration(seconds)}'}")

    def close(self) -> None:
        """Nothing to end."""


def make_display(console: Console) -> Display:
    """The display that fits where the output goes."""
    plain = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(plain)


def _numbers(live: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in live.items())
