"""Several references of one prompt: lists in the data, and several demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rlhf.prepare.sizing import _whole_prompts
from rlhf.prepare.spool import Written
from tests.rlhf.prepare.test_kinds import Prepared, error_of, write


def prompts(folder: Path, rows: list[dict[str, Any]], name: str = "a.jsonl", **columns: str) -> Prepared:
    return Prepared(folder, prompts=write(folder / name, rows), columns=columns)


def test_a_list_gives_the_first_as_text_and_all_as_list(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "reference": [f"r{i}", f"s{i}"][: 1 + i % 2], "n": i} for i in range(6)]
    found = prompts(tmp_path, rows).rows("prompts")
    assert len(found) == 6
    for row in found:
        n = row["n"]
        assert row["reference"] == f"r{n}"
        assert row["references"] == [f"r{n}", f"s{n}"][: 1 + n % 2]


def test_a_text_stays_a_text(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "reference": f"r{i}"} for i in range(3)]
    assert all(row.keys() == {"prompt", "reference"} for row in prompts(tmp_path, rows).rows("prompts"))


def test_a_column_of_another_name(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "gold": ["a", "b"], "references": "of the user, who named another column"}]
    (row,) = prompts(tmp_path, rows, reference="gold").rows("prompts")
    assert row == {"prompt": "p", "reference": "a", "references": ["a", "b"]}


@pytest.mark.parametrize(
    ("value", "fragment"),
    [
        ("text", "'text' is not a list; must be a list of texts, as in other rows"),
        ([], "is an empty list; must have at least one text"),
        (["a", " "], "item 2 ' ' is blank"),
        (["a", 3], "item 2 3 is not text"),
        (None, "is missing or null"),
    ],
)
def test_bad_lists(value: Any, fragment: str, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "reference": ["a"]}, {"prompt": "q", "reference": value}]
    message = error_of(tmp_path, prompts=write(tmp_path / "a.jsonl", rows))
    assert "a.jsonl line 2" in message
    assert fragment in message


def test_the_rows_of_a_prompt_stay_together_however_they_are_stored(tmp_path: Path) -> None:
    schema = pa.schema([("prompt", pa.string()), ("n", pa.int64())])
    written = Written(tmp_path / "x", schema)
    texts = ["a", "a", "a", "b", "c", "c"]
    for start in range(0, len(texts), 2):
        written.add(pa.table({"prompt": texts[start : start + 2], "n": [start, start + 1]}, schema=schema))
    written.close()
    parts = [part.to_pydict() for part in _whole_prompts(written)]
    assert [n for part in parts for n in part["n"]] == list(range(6))
    where = {text: {index for index, part in enumerate(parts) if text in part["prompt"]} for text in texts}
    assert all(len(places) == 1 for places in where.values())
