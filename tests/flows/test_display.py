"""What a person sees of a run while it goes on."""

import io
import math

import pytest
from rich.console import Console

from flows import display
from rlhf.tracking import Entry, Progress


def follow(shown: display.Display) -> None:
    """A stage that says how far it is and is asked to end, and one from the cache."""
    shown.begin("sft")
    shown.watch("sft", Entry(0, 1, {"sft/loss": 3.0}))  # a point of a curve is no progress
    shown.watch("sft", Progress(5, 10, {"loss": 1.23456}))
    shown.ending("sft")
    shown.end("sft", 65.0)
    shown.begin("judge")
    shown.end("judge", None)
    shown.close()


def test_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "LINE_SECONDS", 0.0)
    lines: list[str] = []
    follow(display.PlainDisplay(lines.append))
    assert lines == [
        "sft: 5/10  loss 1.235",
        f"sft: {display.ENDING}",
        "sft: done in 1 m 05 s",
        "judge: from the cache",
    ]


def test_no_more_lines_than_one_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "LINE_SECONDS", math.inf)
    lines: list[str] = []
    plain = display.PlainDisplay(lines.append)
    plain.begin("ppo")
    for step in range(100):
        plain.watch("ppo", Progress(step, 100, {}))
    assert lines == []


def test_bars_on_a_terminal() -> None:
    out = io.StringIO()
    shown = display.make_display(Console(file=out, force_terminal=True, width=120))
    assert isinstance(shown, display.LiveDisplay)
    follow(shown)
    assert "sft" in out.getvalue()
    assert "from the cache" in out.getvalue()


def test_lines_where_there_is_no_terminal() -> None:
    assert isinstance(display.make_display(Console(file=io.StringIO())), display.PlainDisplay)
