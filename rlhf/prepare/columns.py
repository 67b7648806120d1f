"""What the columns of a file may hold, and their types in a table."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from rlhf.errors import DataError, did_you_mean, show
from rlhf.prepare import chat
from rlhf.prepare.formats import Part

VERDICTS = ("chosen", "rejected")
Holds = Literal["text", "talk", "value", "verdict", "number", "texts", "answers", "ranks"]


class Column(NamedTuple):
    """A column that a file has, and what may be in it.

    ``text``: text that is not blank. ``talk``: the same, or a list of messages. ``value``: anything but null.
    ``verdict``: "chosen", "rejected" or null. ``number``: a finite number. ``texts``: a list of at least two
    different texts. ``answers``: a list of at least one text. ``ranks``: a list of numbers.
    """

    name: str
    setting: str  # the key of the configuration that names it
    holds: Holds = "text"
    required: bool = True


class Problem(NamedTuple):
    """What is wrong with a row: a reason to count it under, and the words for a message."""

    reason: Literal["bad", "empty"]
    words: str


class BadRow(NamedTuple):
    """Where in a row something is wrong, such as ``column 'prompt'`` ("" for the row as a whole), and what."""

    where: str
    problem: Problem


def check_names(names: Sequence[str], columns: Sequence[Column], path: str, where: str) -> None:
    """See that a file with columns of these names has all that are needed, each once.

    Raises:
        DataError: it has not.
    """
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(f"{where}: {path} has {count} columns named {name!r}; rename all but one")
    for column in columns:
        if column.required and column.name not in names:
            separator = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
            hint = f"; are its cells separated by {separator!r}? It must be commas" if separator else ""
            raise DataError(
                f"{where}: {path} has no column {column.name!r}, only {', '.join(map(repr, names))}; name "
                f"the right one in {column.setting}{hint or did_you_mean(column.name, names)}"
            )


def problems_of(values: Sequence[Any], column: Column, cells: bool) -> dict[int, Problem]:
    """What is wrong with the values of a column, by their index; ``cells`` are those of a CSV file."""
    check = _CHECKS[column.holds]
    found = {}
    for index, value in enumerate(values):
        problem = check(_cell(value, column.holds) if cells else value)
        if problem is not None:
            found[index] = problem
    return found


def converted(values: list[Any], column: Column) -> list[Any]:
    """The values of a checked column: cells that hold numbers as numbers."""
    return [_cell(value, column.holds) for value in values]


def _cell(value: Any, holds: Holds) -> Any:
    if holds == "number" and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _text(value: Any) -> Problem | None:
    if not isinstance(value, str):
        return _value(value) or Problem("bad", f"{show(value)} is not text; must be text")
    if not value.strip():
        return Problem("empty", f"{show(value)} is blank; must be text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return Problem("bad", f"{show(value)} has half a character (surrogate) at position {error.start + 1}")
    return None


def _talk(value: Any) -> Problem | None:
    if not isinstance(value, list):
        return _text(value)
    if words := chat.problem(value):
        return Problem("bad", words)
    return next(filter(None, (_text(message["content"]) for message in value)), None)


def _value(value: Any) -> Problem | None:
    if value is None:
        return Problem("empty", "is missing or null; must be given")
    return Problem("bad", "is NaN; must be given") if value != value else None


def _verdict(value: Any) -> Problem | None:
    if value is None or value in VERDICTS:
        return None
    hint = did_you_mean(value, VERDICTS) if isinstance(value, str) else ""
    return Problem("bad", f"{show(value)} is not a verdict; must be 'chosen', 'rejected' or null{hint}")


def _number(value: Any) -> Problem | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _value(value) or Problem("bad", f"{show(value)} is not a number; must be a number")
    if not -float("inf") < value < float("inf"):
        return Problem("bad", f"is {value}; must be a finite number")
    return None


def _texts(value: Any) -> Problem | None:
    if not isinstance(value, list):
        return _value(value) or Problem("bad", f"{show(value)} is not a list; must be a list of texts, best first")
    if len(value) < 2:
        return Problem("bad", f"{show(value)} has {len(value)} texts; a ranking has at least two")
    for number, text in enumerate(value, start=1):
        if problem := _text(text):
            return Problem(problem.reason, f"item {number} {problem.words}")
    if len(set(value)) < len(value):
        return Problem("bad", f"the text {show(Counter(value).most_common(1)[0][0])} is in it twice")
    return None


def _answers(value: Any) -> Problem | None:
    if not isinstance(value, list):
        return _value(value) or Problem(
            "bad", f"{show(value)} is not a list; must be a list of texts, as in other rows"
        )
    if not value:
        return Problem("empty", "is an empty list; must have at least one text")
    for number, text in enumerate(value, start=1):
        if problem := _text(text):
            return Problem(problem.reason, f"item {number} {problem.words}")
    return None


def _ranks(value: Any) -> Problem | None:
    if not isinstance(value, list):
        return _value(value) or Problem(
            "bad", f"{show(value)} is not a list; must be a list of numbers, 1 for the best"
        )
    return next(filter(None, map(_number, value)), None)


_CHECKS: dict[Holds, Callable[[Any], Problem | None]] = {
    "text": _text,
    "talk": _talk,
    "value": _value,
    "verdict": _verdict,
    "number": _number,
    "texts": _texts,
    "answers": _answers,
    "ranks": _ranks,
}


# ------------------------------------------------------------------------------------------------------------- types
_NOT_ONE_TYPE = (pa.ArrowException, OverflowError, UnicodeEncodeError)


def typed(part: Part, name: str, rows: Sequence[int] | None, before: pa.DataType | None, where: str) -> pa.Array:
    """A column that comes along, as an array; of the ``rows`` with these indexes, or of all.

    Raises:
        DataError: its values, or these and the type of the rows ``before``, are not of one type.
    """
    column = part.columns[name]
    if not isinstance(column, list):
        array = column.combine_chunks()
        return array if rows is None else array.take(pa.array(rows, pa.int64()))
    indexes = range(len(column)) if rows is None else rows
    values = [column[index] for index in indexes]
    try:
        array = pa.array(values, pa.string() if part.cells else None)
        one_type(before, array.type)
    except _NOT_ONE_TYPE as error:
        first = bisect_left(range(len(values)), True, key=lambda index: not _fits(values[: index + 1], before))
        place = part.origin.place(indexes[min(first, len(values) - 1)])
        raise DataError(
            f"{where}: {place}, column {name!r}: {show(values[min(first, len(values) - 1)])} is not of the "
            f"type of the rows before it ({error}); give all rows one type"
        ) from None
    return array


def one_type(first: pa.DataType | None, second: pa.DataType) -> pa.DataType:
    """The type that holds the values of both; ``pa.ArrowException`` where there is none."""
    if first is None or first.equals(second):
        return second
    fields = [pa.schema([pa.field("x", kind)]) for kind in (first, second)]
    return pa.unify_schemas(fields, promote_options="permissive").field("x").type


def _fits(values: list[Any], before: pa.DataType | None) -> bool:
    try:
        one_type(before, pa.array(values).type)
    except _NOT_ONE_TYPE:
        return False
    return True


class CellType:
    """Whether the cells of a CSV column are whole numbers, numbers, or texts (``007`` is one); an empty one is null.

    No digit is lost: what neither int64 nor, among fractions, a double holds to the last digit stays text.
    """

    def __init__(self) -> None:
        self._kinds = list(_NUMBERS)  # that all cells so far allow
        self._filled = False

    def see(self, cells: Sequence[str | None]) -> None:
        """Look at some cells."""
        filled = [cell for cell in cells if cell]
        self._filled = self._filled or bool(filled)
        self._kinds = [kind for kind in self._kinds if all(map(_NUMBERS[kind], filled))]

    @property
    def type(self) -> pa.DataType:
        """The type of the column."""
        return self._kinds[0] if self._kinds and self._filled else pa.string() if self._filled else pa.null()


_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,18})")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")


def _is_whole(cell: str) -> bool:
    return _WHOLE.fullmatch(cell) is not None and -(2**63) <= int(cell) < 2**63


def _is_number(cell: str) -> bool:
    if _NUMBER.fullmatch(cell) is None:
        return False
    whole = len(cell) > 15 and cell.lstrip("-").isdigit()
    return not whole or (_is_whole(cell) and abs(int(cell)) <= 2**53)


_NUMBERS: dict[pa.DataType, Callable[[str], bool]] = {pa.int64(): _is_whole, pa.float64(): _is_number}
