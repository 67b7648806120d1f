"""Reading a JSON array item by item gives what reading it as a whole gives, errors included."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import example, given, strategies as st

from rlhf.prepare import json_array
from rlhf.prepare.json_array import array_items

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def items(text: str) -> list[Any]:
    return [item for item, _ in array_items(io.StringIO(text), dict)]


@given(st.lists(VALUES, max_size=6), st.sampled_from([None, 0, 1]), st.booleans(), st.sampled_from([1, 2, 7, 30]))
def test_the_items_of_an_array(values: list[Any], indent: int | None, ascii_only: bool, read: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "READ", read)
        assert items(json.dumps(values, indent=indent, ensure_ascii=ascii_only)) == values


def outcome(function: Any, text: str) -> Any:
    """What a reader says of a text: its values, or the place of its error."""
    try:
        return function(text)
    except json.JSONDecodeError as error:
        return error.lineno
    except TypeError as error:
        return error.args[0]


@given(
    st.lists(VALUES, max_size=4),
    st.integers(0, 10**6),
    st.sampled_from('}]",:x1\n'),
    st.integers(0, 1),
    st.integers(2, 9),
)
@example([{}, {}], 4, "1", 1, 2)
def test_damage_is_found_as_in_the_whole(values: list[Any], at: int, new: str, cut: int, read: int) -> None:
    text = json.dumps(values, indent=1)
    at %= len(text)
    text = text[:at] + new + text[at + cut :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "READ", read)
        whole, piecewise = outcome(json.loads, text), outcome(items, text)
    assert piecewise == whole


def test_line_and_column_are_those_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "READ", 8)
    text = '[{"a": "some text"},\n {"a": "more"},  {"a" 1}]'
    with pytest.raises(json.JSONDecodeError) as whole:
        json.loads(text)
    with pytest.raises(json.JSONDecodeError) as found:
        items(text)
    assert (found.value.lineno, found.value.colno) == (whole.value.lineno, whole.value.colno) == (2, 23)
