"""Charts of a report, whose lines are where their numbers are, and numbers for people."""

from __future__ import annotations

import math
import re

import pytest

from rlhf.report import charts, svg, words
from rlhf.report.charts import Curve, Dot, Spread
from rlhf.report.training import thin
from tests.rlhf.report_sources import EVIL, STRANGE

# --- charts


@pytest.mark.parametrize(
    ("low", "high", "about", "expected"),
    [
        (0.0, 1.0, 5, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-1.1, 1.1, 4, ["−1.0", "−0.5", "0.0", "0.5", "1.0"]),
        (0.0, 9000.0, 5, ["0", "2k", "4k", "6k", "8k"]),
        (0.0, 0.00031, 4, ["0.0000", "0.0001", "0.0002", "0.0003"]),
        (0.0, 3e6, 3, ["0", "1M", "2M", "3M"]),
    ],
)
def test_ticks_are_round(low: float, high: float, about: int, expected: list[str]) -> None:
    assert [label for _, label in svg.ticks(low, high, about)] == expected


def test_whole_ticks_have_no_fractions() -> None:
    assert [value for value, _ in svg.ticks(0.5, 2.5, whole=True)] == [1.0, 2.0]


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [2.0, 2.0], [math.nan, math.nan], [1.0, math.nan, 3.0], [0.0, -1e12], [1e-12, 2e-12], [math.inf, 1.0]],
)
def test_lines_of_anything_have_finite_coordinates(values: list[float]) -> None:
    x = [float(i) for i in range(len(values))]
    picture = charts.lines([Curve("a", "one", x, values, values, values)], "t", "x", "y")
    assert "nan" not in picture
    assert "inf" not in picture.replace("inferior", "")


def test_lines_have_a_gap_where_a_value_is_missing() -> None:
    y = [1.0, 2.0, math.nan, 2.0, 1.0]
    picture = charts.lines([Curve("a", "one", [0.0, 1.0, 2.0, 3.0, 4.0], y)], "t", "x", "y")
    assert picture.count('class="line one"') == 2


def test_a_line_is_where_its_numbers_are() -> None:
    picture = charts.lines([Curve("a", "one", [0.0, 10.0], [0.0, 1.0])], "t", "x", "y")
    [(x1, y1, x2, y2)] = re.findall(r'd="M([\d.]+) ([\d.]+) L([\d.]+) ([\d.]+)" class="line one"', picture)
    at = {label: float(y) for y, label in re.findall(r'y="([\d.]+)" class="tick" text-anchor="end">([\d.]+)<', picture)}
    assert float(x1) < float(x2)
    assert float(y1) == pytest.approx(at["0.0"] - 4, abs=0.02)
    assert float(y2) == pytest.approx(at["1.0"] - 4, abs=0.02)


def test_histograms_and_boxes_are_where_their_numbers_are() -> None:
    spread = Spread(0.0, 1.0, 2.0, 3.0, 4.0, 2.5)
    picture = charts.spreads([0.0, 2.0, 4.0], {"ppo": [1, 3]}, {"ppo": spread}, "t", "x")
    ticks = {label: float(x) for x, label in re.findall(r'<text x="([\d.]+)"[^>]*middle">(\d)<', picture)}
    [(left, width)] = re.findall(
        r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="12" class="fill ppo"', picture
    )
    assert float(left) == pytest.approx(ticks["1"], abs=0.02)
    assert float(left) + float(width) == pytest.approx(ticks["3"], abs=0.02)
    [outline] = re.findall(r'd="([^"]*)Z" class="fill ppo"', picture)
    heights = {float(step.split()[1]) for step in re.split("[ML]", outline) if step}
    assert max(heights) - min(heights) == pytest.approx(36.0)  # the fuller bin has the whole height


def test_dots_without_an_interval_or_a_value() -> None:
    rows = [Dot("a", "one", (0.5, math.nan, math.nan), "50 %"), Dot("b", "one", (math.nan,) * 3, "–")]
    picture = charts.dots(rows, "t", "x", middle=0.5, limits=(0.0, 1.0))
    assert picture.count("<circle") == 1
    assert "nan" not in picture


def test_names_in_a_chart_are_escaped() -> None:
    picture = charts.bars({EVIL + STRANGE: [("one", 1.0)]}, EVIL, "x")
    assert "<script" not in picture
    assert "\u202e" not in picture


def test_thinned_points_keep_the_first_and_the_last() -> None:
    points = [(i, float(i)) for i in range(1000)]
    assert list(thin(points, 7)) == [(i, float(i)) for i in (0, 166, 333, 500, 666, 832, 999)]
    assert thin(points[:7], 7) == points[:7]


# --- numbers


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (words.number(-1.0, 1), "−1.0"),
        (words.number(1234567.0, 0), "1,234,567"),
        (words.number(28614631.86, 2), "28,614,632"),
        (words.number(-0.0004, 3, sign=True), "0.000"),
        (words.number(None), "–"),
        (words.number(math.nan), "–"),
        (words.significant(0.0), "0"),
        (words.significant(12.3456), "12.35"),
        (words.significant(0.000012), "1.200e−05"),
        (words.significant(123456.7), "123,457"),
        (words.percent(0.756), "76\u00a0%"),
        (words.p_value(0.0), "< 0.001"),
        (words.p_value(0.04), "0.040"),
        (words.interval({"value": 1.0, "low": None, "high": None}, 1), "1.0"),
        (words.percents({"value": 0.5, "low": 0.4, "high": 0.6}), "50\u00a0% [40, 60]"),
        (words.energy(7200.0), "2.00 Wh"),
        (words.energy(7.2e6), "2.00 kWh"),
        (words.listed(["a", "b", "c"]), "a, b and c"),
        (words.shortened("a" * 1010, 10), "aaaaaaaaaa … [1,000 more characters]"),
    ],
)
def test_numbers_for_people(written: str, expected: str) -> None:
    assert written == expected
