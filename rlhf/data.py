"""Reads the user's data: every file of a setting into one table, with the place of each row.

Every row is checked, and a bad one is named by file, row and column. Rows are counted from 1; in JSON Lines
and CSV a place is the line in the file, so that an editor finds it.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.errors import DataError
from rlhf.explain import did_you_mean, show
from rlhf.formats import BadRows, Origin, Part, read_file
from rlhf.locations import matching_files

VERDICTS = ("chosen", "rejected")


class Column(NamedTuple):
    """A column that a file has, and what may be in it.

    ``text``: text that is not blank. ``value``: anything but null. ``verdict``: "chosen", "rejected" or null.
    """

    name: str
    setting: str  # the key of the configuration that names it
    holds: Literal["text", "value", "verdict"] = "text"
    required: bool = True


class Rows:
    """The rows of several files in one table, and the place of each."""

    def __init__(self, table: pa.Table, origins: Sequence[Origin]) -> None:
        self.table = table
        self._origins = tuple(origins)
        self._starts = [0]
        for origin in origins:
            self._starts.append(self._starts[-1] + len(origin.numbers))

    def place(self, row: int) -> str:
        """The place of a row for a message: ``my/file.jsonl line 17``."""
        index = bisect_right(self._starts, row) - 1
        path, unit, numbers = self._origins[index]
        return f"{path} {unit} {numbers[row - self._starts[index]]}"


def read_rows(files: Sequence[str], columns: Sequence[Column], where: str) -> Rows:
    """All rows of the files that a setting names.

    Args:
        files: names as in the configuration: paths, patterns, ``demo:x``, folders of ``save_to_disk``.
        columns: the columns that each file has; other columns come along as they are.
        where: the setting, for messages, e.g. ``data.preferences``.

    Raises:
        DataError: a file cannot be read, lacks a column, or has a bad row.
    """
    paths = [path for name in files for path in matching_files(name, where)]
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            raise DataError(f"{where}: {path} is named {count} times; name it once")
    bad = BadRows(where)
    parts: list[Part] = []
    for path in paths:
        part = read_file(path, where, bad)
        if part.origin.numbers:
            _check_columns(part, columns, where, parts[0] if parts else part)
            for column in columns:
                _check_values(part, column, bad)
            parts.append(part)
        elif not bad.count:
            raise DataError(f"{where}: {path} has no rows; give it some, or leave it out")
    bad.check("Correct these rows, or take them out.")
    text = {column.name for column in columns if column.holds == "text"}
    tables = [_table(part, text, where) for part in parts]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
        pq.write_table(table.slice(0, 0), pa.BufferOutputStream())  # do all of its types exist in Parquet?
    except pa.ArrowException as error:
        names = ", ".join(str(part.origin.path) for part in parts)
        raise DataError(f"{where}: the columns of {names} cannot be stored, each as one type: {error}") from error
    return Rows(table, [part.origin for part in parts])


def _check_columns(part: Part, columns: Sequence[Column], where: str, first: Part) -> None:
    """Raise unless the file has the columns, each once, and the same ones as the first file."""
    path, names = part.origin.path, part.names
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
    odd = sorted(set(names) ^ set(first.names))
    if odd:
        has, lacks = (path, first.origin.path) if odd[0] in names else (first.origin.path, path)
        raise DataError(
            f"{where}: {has} has a column {odd[0]!r} that {lacks} lacks; the files of one setting must have "
            "the same columns"
        )


def _check_values(part: Part, column: Column, bad: BadRows) -> None:
    if column.name not in part.names:
        return
    path, unit, numbers = part.origin
    values = part.columns[column.name]
    check = _CHECKS[column.holds]
    for index, value in enumerate(values if isinstance(values, list) else values.to_pylist()):
        problem = check(value)
        if problem:
            bad.add(f"{path} {unit} {numbers[index]}, column {column.name!r}", problem)


def _text_problem(value: Any) -> str | None:
    if not isinstance(value, str):
        return _value_problem(value) or f"{show(value)} is not text; must be text"
    if not value.strip():
        return f"{show(value)} is blank; must be text"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"{show(value)} has half a character (surrogate) at position {error.start + 1}"
    return None


def _value_problem(value: Any) -> str | None:
    if value is None:
        return "is missing or null; must be given"
    return "is NaN; must be given" if value != value else None


def _verdict_problem(value: Any) -> str | None:
    if value is None or value in VERDICTS:
        return None
    hint = did_you_mean(value, VERDICTS) if isinstance(value, str) else ""
    return f"{show(value)} is not a verdict; must be 'chosen', 'rejected' or null{hint}"


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "text": _text_problem,
    "value": _value_problem,
    "verdict": _verdict_problem,
}


# --- tables

_NOT_ONE_TYPE = (pa.ArrowException, OverflowError, UnicodeEncodeError)


def _table(part: Part, text: set[str], where: str) -> pa.Table:
    """The part as a table; the columns in ``text``, which were checked, are of the type string."""
    columns = part.columns
    if isinstance(columns, pa.Table):
        for index, name in enumerate(columns.column_names):
            if name in text:
                columns = columns.set_column(index, name, columns[name].cast(pa.string()))
        return columns
    from_csv = part.origin.path.suffix.lower() == ".csv"
    arrays = {}
    for name, values in columns.items():
        if name in text:
            arrays[name] = pa.array(values, pa.string())
        else:
            arrays[name] = _array(_numbers(values) if from_csv else values, name, part, where)
    return pa.table(arrays)


def _array(values: list[Any], name: str, part: Part, where: str) -> pa.Array:
    try:
        return pa.array(values)
    except _NOT_ONE_TYPE as error:
        first = bisect_left(range(len(values)), True, key=lambda index: not _fits(values[: index + 1]))
        path, unit, numbers = part.origin
        raise DataError(
            f"{where}: {path} {unit} {numbers[first]}, column {name!r}: {show(values[first])} is not of the "
            f"type of the rows before it ({error}); give all rows one type"
        ) from None


def _fits(values: list[Any]) -> bool:
    try:
        pa.array(values)
    except _NOT_ONE_TYPE:
        return False
    return True


def _numbers(cells: list[str | None]) -> list[Any]:
    """The cells of a CSV column: numbers if all of them are (``007`` is not one); an empty one is null."""
    filled = [cell for cell in cells if cell]
    for pattern, kind in _NUMBERS.items():
        if filled and all(re.fullmatch(pattern, cell) for cell in filled):
            return [kind(cell) if cell else None for cell in cells]
    return cells


_NUMBERS: dict[str, Callable[[str], int | float]] = {
    r"-?(0|[1-9][0-9]{0,17})": int,
    r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?": float,
}
