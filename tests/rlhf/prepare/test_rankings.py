"""Rankings of several responses: the pairs that they become, and ties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.rlhf.prepare.test_kinds import Prepared, error_of, write


def test_a_ranking_becomes_all_of_its_pairs(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "responses": ["best", "good", "bad"], "n": 1},
        {"prompt": "q", "responses": ["x", "y"], "n": 2},
    ]
    made = Prepared(tmp_path, preferences=write(tmp_path / "a.jsonl", rows))
    found = made.rows("preferences")
    pairs = {("best", "good"), ("best", "bad"), ("good", "bad"), ("x", "y")}
    assert {(row["chosen"], row["rejected"]) for row in found} == pairs
    by_ranking = {row["ranking"]: row["prompt"] for row in found}
    assert sorted(by_ranking.values()) == ["p", "q"]
    assert [row["ranking"] for row in found] == sorted(row["ranking"] for row in found)
    assert all(row["n"] == (1 if row["prompt"] == "p" else 2) for row in found)
    assert made.report["preferences"]["rows"] == made.report["preferences"]["kept"] == 2
    assert made.report["preferences"]["splits"]["train"] == 4


def test_ranks_with_a_tie(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "responses": ["c", "a", "b"], "rank": [3, 1, 1]}]
    made = Prepared(tmp_path, preferences=write(tmp_path / "a.jsonl", rows), columns={"ranks": "rank"})
    assert {(row["chosen"], row["rejected"]) for row in made.rows("preferences")} == {("a", "c"), ("b", "c")}


def test_a_ranking_of_ties_alone_is_counted(tmp_path: Path) -> None:
    tied = [{"prompt": f"q{i}", "responses": ["a", "b"], "rank": [2, 2]} for i in range(2)]
    rows = [*tied, {"prompt": "p", "responses": ["c", "a", "b"], "rank": [3, 1, 1]}]
    made = Prepared(tmp_path, preferences=write(tmp_path / "a.jsonl", rows), columns={"ranks": "rank"})
    found = made.report["preferences"]
    assert (found["rows"], found["kept"], found["lost"]["tied"]) == (3, 1, 2)
    assert found["splits"]["train"] == 2


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"responses": ["a"]}, "has 1 texts; a ranking has at least two"),
        ({"responses": ["a", "a"]}, "the text 'a' is in it twice"),
        ({"responses": ["a", " "]}, "item 2 ' ' is blank"),
        ({"responses": "a"}, "is not a list; must be a list of texts"),
        ({"responses": ["a", "b"], "rank": [1]}, "has 2 responses and 1 ranks"),
        ({"responses": ["a", "b"], "rank": [1, "x"]}, "'x' is not a number"),
    ],
)
def test_bad_rankings(row: dict[str, Any], fragment: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "rank": [1, 2]} | row])
    message = error_of(tmp_path, preferences=path, columns={"ranks": "rank"})
    assert f"{path} line 1" in message
    assert fragment in message
