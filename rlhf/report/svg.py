"""SVG by hand: elements with everything escaped, scales, ticks, and the axes around a plot.

Nothing here has a colour: elements have classes, and the page's style sheet gives each class its colours for light and
dark, its dashes and its hatches. Coordinates are in units of the view box, of which a chart is ``WIDTH`` wide: a chart
that is shown 360 pixels wide has text of 13 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from rlhf.report.words import visible

WIDTH = 360.0
CHARACTER = 7.2  # mean width of a character of tick labels, rather too wide than too narrow
MINUS = "\N{MINUS SIGN}"


def element(tag: str, *children: str, **attributes: str | float | None) -> Markup:
    """An element; text and attributes are escaped, None leaves an attribute out.

    ``class_`` is ``class``, and other underscores are hyphens.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _written(value))
        for name, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), written, Markup("").join(map(_shown, children)))


def drawing(height: float, title: str, description: str, parts: Iterable[Markup], width: float = WIDTH) -> Markup:
    """A whole picture with its name and what it shows, for those who do not see it."""
    head = (element("title", title), element("desc", description))
    box = f"0 0 {_written(width)} {_written(height)}"
    return element("svg", *head, *parts, viewBox=box, role="img", class_="chart")


def text(x: float, y: float, content: str, class_: str = "tick", anchor: str = "start") -> Markup:
    """A line of text; ``y`` is its baseline."""
    return element("text", content, x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str, *, closed: bool = False) -> Markup:
    """A line through points."""
    steps = " ".join(f"{'L' if i else 'M'}{_written(x)} {_written(y)}" for i, (x, y) in enumerate(points))
    return element("path", d=f"{steps}{'Z' if closed else ''}", class_=class_)


class Scale(NamedTuple):
    """Maps ``low..high`` of the data to ``start..end`` of the picture, linearly."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def around(values: Iterable[float], margin: float = 0.06) -> tuple[float, float]:
    """A range with all finite values in it, and some space; 0 to 1 where there are none.

    Values that differ by rounding alone are one value.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    largest = max(abs(low), abs(high))
    space = (high - low) * margin if high - low > 1e-6 * largest else largest * 0.1 or 1.0
    return low - space, high + space


def ticks(low: float, high: float, about: int = 5, *, whole: bool = False) -> list[tuple[float, str]]:
    """Round values within a range, about so many, and how they are written. ``whole`` allows no fractions."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.9)
    step = max(1.0, step) if whole else step
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(number * step, _tick(number * step, step, decimals)) for number in range(first, last + 1)]


def _tick(value: float, step: float, decimals: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if step >= size / 10 and abs(value) >= size:
            return f"{value / size:g}{unit}".replace("-", MINUS)
    written = f"{value:.{decimals}f}" if decimals <= 7 else f"{value:.3g}"
    return written.replace("-", MINUS)


class Plot(NamedTuple):
    """The two scales of a plot, and its axes as they are drawn below everything else."""

    x: Scale
    y: Scale
    axes: list[Markup]


def plot(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_label: str,
    y_label: str,
    height: float,
    *,
    whole: bool = False,
) -> Plot:
    """Axes with ticks and a grid. The label of y stands above, where it needs no turning of the head.

    Args:
        whole: whether x has whole numbers only, such as steps.
    """
    top, bottom = 26.0 if y_label else 10.0, height - 38.0
    marks = ticks(*y_range)
    left = max((len(label) for _, label in marks), default=1) * CHARACTER + 10.0
    x, y = Scale(*x_range, left, WIDTH - 10.0), Scale(*y_range, bottom, top)
    axes = [text(0, 13, y_label, "label")] if y_label else []
    for value, label in marks:
        axes += [
            line(left, y(value), WIDTH - 10.0, y(value), "grid"),
            text(left - 6, y(value) + 4, label, anchor="end"),
        ]
    return Plot(x, y, [*axes, *x_axis(x, bottom, x_label, whole=whole)])


def x_axis(x: Scale, bottom: float, label: str, *, top: float | None = None, whole: bool = False) -> list[Markup]:
    """The axis at the bottom; with ``top``, lines of a grid go up to there."""
    parts = [line(x.start, bottom, x.end, bottom, "axis")]
    for value, mark in ticks(x.low, x.high, 6, whole=whole):
        if top is not None:
            parts.append(line(x(value), top, x(value), bottom, "grid"))
        parts.append(line(x(value), bottom, x(value), bottom + 4, "axis"))
        parts.append(text(x(value), bottom + 17, mark, anchor="middle"))
    return [*parts, text((x.start + x.end) / 2, bottom + 33, label, "label", "middle")]


def _shown(child: str) -> Markup:
    return child if isinstance(child, Markup) else escape(visible(child))


def _written(value: str | float) -> str:
    if isinstance(value, str):
        return value
    written = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if written == "-0" else written
