"""The charts of the page, each from plain numbers to a picture. A name of a look is a class of the style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from rlhf.report import svg
from rlhf.report.svg import WIDTH, Scale, element

HEIGHT = 232.0
LOOKS = ("base", "sft", "ppo", "reference", "training", "chosen", "rejected")
OTHERS = ("one", "two", "three", "four", "five")  # looks of what is no policy, in their order
ROW_LABELS = 74.0  # width of the names of policies


class Curve(NamedTuple):
    """A line with its points; NaN is a gap. ``low`` and ``high`` are of a band around it, ``marked`` points have a
    triangle."""

    name: str
    look: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    marked: Sequence[bool] = ()


class Spread(NamedTuple):
    """Percentiles and mean of some values."""

    low: float
    quartile: float
    median: float
    third_quartile: float
    high: float
    mean: float


class Dot(NamedTuple):
    """A row of a dot plot: an estimate with its interval, perhaps a second one below, and how both read."""

    name: str
    look: str
    value: tuple[float, float, float]
    written: str
    second: tuple[float, float, float] | None = None


def lines(
    curves: Sequence[Curve],
    title: str,
    x_label: str,
    y_label: str,
    *,
    dots: bool = False,
    whole: bool = True,
    upright: Mapping[str, float] | None = None,
) -> Markup:
    """Curves over the same x, with dots on their points or without; ``upright`` names places on x with a line."""
    values = [v for curve in curves for part in (curve.y, curve.low, curve.high) for v in part]
    xs = [x for curve in curves for x in curve.x] + list((upright or {}).values())
    low, high = svg.around(xs, 0.02)
    plot = svg.plot((max(low, min(xs, default=0.0)), high), svg.around(values), x_label, y_label, HEIGHT, whole=whole)
    parts = list(plot.axes)
    for name, place in (upright or {}).items():
        parts.append(svg.line(plot.x(place), plot.y.end, plot.x(place), plot.y.start, "upright"))
        parts.append(svg.text(plot.x(place) - 4, plot.y.end + 9, name, "tick", "end"))
    for curve in curves:
        parts += _curve(curve, plot, dots)
    return svg.drawing(HEIGHT, title, _reads(curves, y_label, x_label), parts)


def _curve(curve: Curve, plot: svg.Plot, dots: bool) -> list[Markup]:
    """The band, the line in pieces without gaps, and the points of one curve."""
    parts = []
    for piece in _pieces(curve.y):
        points = [(plot.x(curve.x[i]), plot.y(curve.y[i])) for i in piece]
        if len(curve.low) and len(piece) > 1:
            edge = [(plot.x(curve.x[i]), plot.y(curve.high[i])) for i in piece]
            edge += [(plot.x(curve.x[i]), plot.y(curve.low[i])) for i in reversed(piece)]
            parts.append(svg.path(edge, f"band {curve.look}", closed=True))
        if len(piece) > 1:
            parts.append(svg.path(points, f"line {curve.look}"))
        if dots or len(piece) == 1:
            parts += [element("circle", cx=x, cy=y, r=2.8, class_=f"dot {curve.look}") for x, y in points]
        for i, (x, y) in zip(piece, points, strict=True):
            if len(curve.marked) and curve.marked[i]:
                parts.append(svg.path([(x - 6, y - 18), (x + 6, y - 18), (x, y - 8)], "alarm", closed=True))
    return parts


def _pieces(values: Sequence[float]) -> list[list[int]]:
    """Places of the values, in runs without a gap."""
    pieces: list[list[int]] = [[]]
    for i, value in enumerate(values):
        if math.isfinite(value):
            pieces[-1].append(i)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def spreads(
    edges: Sequence[float],
    counts: Mapping[str, Sequence[int]],
    groups: Mapping[str, Spread],
    title: str,
    x_label: str,
) -> Markup:
    """A histogram for each group (the share of its texts in each bin), and below each its box plot, over one axis.

    A box reaches from quartile to quartile with a line at the median; whiskers at 5 and 95 %, a diamond at the mean.
    """
    row = 70.0
    height = row * len(counts) + 44.0
    ends = [*edges, *(value for group in groups.values() for value in group)]
    x = Scale(*svg.around(ends, 0.02), ROW_LABELS, WIDTH - 10.0)
    parts = svg.x_axis(x, height - 40.0, x_label, top=2.0)
    shares = {name: [count / max(1, sum(of)) for count in of] for name, of in counts.items()}
    largest = max((share for of in shares.values() for share in of), default=1.0) or 1.0
    for number, (name, of) in enumerate(shares.items()):
        floor, look = row * number + 42.0, look_of(name)
        parts += _histogram(x, edges, [share / largest * 36.0 for share in of], floor, look)
        parts.append(svg.text(ROW_LABELS - 8, floor + 4, name, "name", "end"))
        if name in groups:
            parts += _box(x, groups[name], floor + 13.0, look)
    said = "; ".join(f"{name}: median {of.median:.3g}, quartiles {of.quartile:.3g} and {of.third_quartile:.3g}"
                     for name, of in groups.items())  # fmt: skip
    return svg.drawing(height, title, f"Histograms and box plots of {x_label}. {said}.", parts)


def _histogram(x: Scale, edges: Sequence[float], heights: Sequence[float], floor: float, look: str) -> list[Markup]:
    outline = [(x(edges[0]), floor)]
    for i, up in enumerate(heights):
        outline += [(x(edges[i]), floor - up), (x(edges[i + 1]), floor - up)]
    outline.append((x(edges[-1]), floor))
    shapes = [svg.path(outline, f"{kind} {look}", closed=True) for kind in ("fill", "hatch")]
    return [*shapes, svg.line(x.start, floor, x.end, floor, "rule")]


def _box(x: Scale, of: Spread, middle: float, look: str) -> list[Markup]:
    parts = [svg.line(x(of.low), middle, x(of.high), middle, f"whisker {look}")]
    parts += [svg.line(x(end), middle - 4, x(end), middle + 4, f"whisker {look}") for end in (of.low, of.high)]
    parts += _filled(x(of.quartile), middle - 6, x(of.third_quartile), middle + 6, look)
    parts.append(svg.line(x(of.median), middle - 7, x(of.median), middle + 7, "median"))
    at = x(of.mean)
    corners = [(at - 4, middle), (at, middle - 4), (at + 4, middle), (at, middle + 4)]
    return [*parts, svg.path(corners, "mean", closed=True)]


def _filled(x1: float, y1: float, x2: float, y2: float, look: str) -> list[Markup]:
    """A rectangle in the colour of a look, and its hatch over it."""
    place: dict[str, str | float | None] = {"x": x1, "y": y1, "width": max(0.5, x2 - x1), "height": y2 - y1}
    return [element("rect", **place, class_=f"{kind} {look}") for kind in ("fill", "hatch")]


def dots(rows: Sequence[Dot], title: str, x_label: str, *, middle: float, limits: tuple[float, float]) -> Markup:
    """A row for each estimate: its name and how it reads, below it the value with its interval.

    A second estimate is a hollow diamond. ``middle`` is where neither side is better.
    """
    step = 44.0
    height = step * len(rows) + 44.0
    x = Scale(*limits, 13.0, WIDTH - 13.0)
    bottom = height - 40.0
    parts = svg.x_axis(x, bottom, x_label, top=2.0)
    parts.append(svg.line(x(middle), 2.0, x(middle), bottom, "middle"))
    for number, row in enumerate(rows):
        base = step * number + 14.0
        parts.append(svg.text(2, base, row.name, "name"))
        parts.append(svg.text(WIDTH - 2, base, row.written, "figure", "end"))
        parts += _estimate(row.value, x, base + 12.0, row.look, hollow=False)
        if row.second is not None:
            parts += _estimate(row.second, x, base + 21.0, row.look, hollow=True)
    said = "; ".join(f"{row.name}: {row.written}" for row in rows)
    return svg.drawing(height, title, f"{x_label}. {said}.", parts)


def _estimate(value: tuple[float, float, float], x: Scale, y: float, look: str, *, hollow: bool) -> list[Markup]:
    at, low, high = value
    parts = []
    if math.isfinite(low) and math.isfinite(high):
        parts.append(svg.line(x(low), y, x(high), y, f"interval {look}"))
    if not math.isfinite(at):
        return parts
    if hollow:
        corners = [(x(at) - 5, y), (x(at), y - 5), (x(at) + 5, y), (x(at), y + 5)]
        return [*parts, svg.path(corners, f"hollow {look}", closed=True)]
    return [*parts, element("circle", cx=x(at), cy=y, r=4.5, class_=f"dot {look}")]


def bars(rows: Mapping[str, Sequence[tuple[str, float]]], title: str, x_label: str) -> Markup:
    """A bar for each row, made of parts with a look each, one after the other."""
    step = 42.0
    height = step * len(rows) + 44.0
    bottom = height - 40.0
    longest = max((sum(value for _, value in parts) for parts in rows.values()), default=1.0) or 1.0
    x = Scale(0.0, longest * 1.02, 6.0, WIDTH - 16.0)
    drawn = svg.x_axis(x, bottom, x_label, top=4.0)
    for number, (name, pieces) in enumerate(rows.items()):
        top, begun = step * number + 18.0, 0.0
        drawn.append(svg.text(5, top - 5, name, "name"))
        for look, value in pieces:
            if value > 0:
                drawn += _filled(x(begun), top, x(begun + value), top + 16.0, look)
            begun += value
    said = "; ".join(f"{name}: {sum(value for _, value in pieces):.6g}" for name, pieces in rows.items())
    return svg.drawing(height, title, f"{x_label}. {said}.", drawn)


def reliability(bins: Sequence[Mapping[str, float]], title: str, x_label: str, y_label: str) -> Markup:
    """What came true over the confidence, with its interval; on the dotted line, confidence is right.

    ``bins`` have confidence, right, low and high.
    """
    height = 330.0
    plot = svg.plot((-0.02, 1.02), (-0.02, 1.02), x_label, y_label, height)
    parts = [*plot.axes, svg.line(plot.x(0), plot.y(0), plot.x(1), plot.y(1), "middle")]
    places = [(plot.x(of["confidence"]), plot.y(of["right"])) for of in bins]
    parts += [svg.line(x, plot.y(of["low"]), x, plot.y(of["high"]), "interval one")
              for (x, _), of in zip(places, bins, strict=True)]  # fmt: skip
    parts.append(svg.path(places, "line one")) if len(places) > 1 else None
    parts += [element("circle", cx=x, cy=y, r=4, class_="dot one") for x, y in places]
    said = "; ".join(f"{of['confidence']:.2f}: {of['right']:.2f}" for of in bins)
    return svg.drawing(height, title, f"{y_label} by {x_label}. {said}.", parts)


def lineage(names: Sequence[tuple[str, str]], edges: Sequence[tuple[str, str]], title: str) -> Markup:
    """Stages one below the other, each with a line of words, and an arc to each stage from those that it read.

    Args:
        names: each stage and what is said of it.
        edges: from which stage to which, both among the names.
    """
    step, left = 50.0, 92.0
    height = step * len(names)
    places = {name: step * i + 24.0 for i, (name, _) in enumerate(names)}
    arcs = []
    for source, target in edges:
        start, end = places[source] + 5.0, places[target] - 5.0
        reach = 16.0 + 13.0 * min(5.0, (places[target] - places[source]) / step)
        bend = (
            f"M{left} {start:.1f}C{left - reach} {start + 6:.1f} {left - reach} {end - 6:.1f} {left - 7:.1f} {end:.1f}"
        )
        arcs += [element("path", d=bend, class_="arc")]
        arcs.append(svg.path([(left - 9, end - 4), (left - 2, end), (left - 10, end + 3)], "arrow", closed=True))
    parts = arcs
    for name, words in names:
        y = places[name]
        parts.append(
            element("circle", cx=left + 4, cy=y, r=7, class_=f"node {'cached' if 'cache' in words else 'ran'}")
        )
        parts += [svg.text(left + 20, y + 1, name, "name"), svg.text(left + 20, y + 16, words, "tick")]
    said = "; ".join(f"{target} from {source}" for source, target in edges)
    return svg.drawing(height, title, f"Which stage read which. {said}.", parts)


def look_of(name: str, number: int = 0) -> str:
    """The look of a policy or of a side of pairs; of anything else that of its number."""
    return name if name in LOOKS else OTHERS[number % len(OTHERS)]


def _reads(curves: Sequence[Curve], y_label: str, x_label: str) -> str:
    """What curves show, in words."""
    parts = []
    for curve in curves:
        known = [y for y in curve.y if math.isfinite(y)]
        if known:
            parts.append(f"{curve.name} goes from {known[0]:.3g} to {known[-1]:.3g}")
    return f"{y_label} by {x_label}. {'; '.join(parts)}."
