"""Columns that are computed from others, by functions that are built in or the user's own."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from rlhf.config.data import Computed
from rlhf.errors import ConfigError, DataError
from rlhf.prepare.columns import BadRow, Problem
from rlhf.prepare.formats import Part

Columns = Mapping[str, Sequence[Any]]
Function = Callable[..., Sequence[Any]]  # lists of values by name of column -> a value for each row


def word_count(texts: Sequence[str]) -> list[int]:
    """Number of words of each text, as the reward ``exact_word_count`` counts them."""
    from rlhf.metrics.word_count import word_count as words

    return [words(text) for text in texts]


def first_words(texts: Sequence[str], count: int) -> list[str]:
    """The first words of each text, as many as ``count``, with the space between them as it is."""
    found = []
    for text in texts:
        rest = text.split(None, count)
        found.append(text[: len(text) - len(rest[count])].rstrip() if len(rest) > count else text.rstrip())
    return found


def draw(texts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """One of the values for each row, evenly; the sha256 of what the row has in the column decides."""
    texts = [text if isinstance(text, str) else json.dumps(text, sort_keys=True, default=str) for text in texts]
    points = (int.from_bytes(hashlib.sha256(f"draw {text}".encode()).digest()[:8], "big") for text in texts)
    return [values[point % len(values)] for point in points]


class ComputedColumns:
    """The columns of ``data.computed``. A later one may read an earlier one."""

    def __init__(self, specs: Mapping[str, Computed]) -> None:
        self.names = tuple(specs)
        self._functions = {name: spec.function for name, spec in specs.items()}
        self._specs = specs

    @cached_property
    def _made(self) -> dict[str, tuple[Function, tuple[str, ...] | None]]:
        return {name: _make(name, spec) for name, spec in self._specs.items()}

    def columns(self, part: Part, rows: list[int], bad: dict[int, BadRow], where: str) -> dict[str, list[Any]]:
        """The columns for these rows of a part, null for others; a row that a function fails on is added to ``bad``.

        Raises:
            DataError: a function reads a column that is not there.
            ConfigError: a function cannot be loaded.
        """
        made: dict[str, list[Any]] = {}
        for name, (function, needs) in self._made.items():
            there = {*part.names, *made}
            for column in needs or ():
                if column not in there:
                    raise DataError(
                        f"{where}: data.computed.{name} reads the column {column!r}, which {part.origin.path} "
                        f"has not, only {', '.join(map(repr, part.names))}"
                    )
            columns = {column: made[column] if column in made else part.values(column) for column in needs or there}
            made[name] = [None] * len(part.origin.numbers)
            for row, value in self._values(name, function, columns, [row for row in rows if row not in bad], bad):
                made[name][row] = value
        return made

    def _values(
        self, name: str, function: Function, columns: Columns, rows: list[int], bad: dict[int, BadRow]
    ) -> Iterator[tuple[int, Any]]:
        """The value of each row; if the function fails on all of them together, it is asked row by row."""
        try:
            yield from zip(rows, _call(function, columns, rows), strict=True)
            return
        except Exception as error:
            if len(rows) == 1:
                words = f"the function {self._functions[name]!r} fails: {type(error).__name__}: {error}"
                bad[rows[0]] = BadRow(f"computed column {name!r}", Problem("bad", words))
                return
        for row in rows:
            yield from self._values(name, function, columns, [row], bad)


def _call(function: Function, columns: Columns, rows: list[int]) -> list[Any]:
    values = list(function(**{name: [column[row] for row in rows] for name, column in columns.items()}))
    if len(values) != len(rows):
        raise ValueError(f"it returned {len(values)} values for {len(rows)} rows")
    return values


def _make(name: str, computed: Computed) -> tuple[Function, tuple[str, ...] | None]:
    """The function of a column, and the columns that it reads; None where it takes all.

    Raises:
        ConfigError: it cannot be loaded.
    """
    column = str(computed.column)
    match computed.function:
        case "word_count":
            return _of(column, word_count), (column,)
        case "first_words":
            return _of(column, partial(first_words, count=computed.count or 0)), (column,)
        case "draw":
            return _of(column, partial(draw, values=computed.values)), (column,)
    from rlhf.rewards import load_function

    function = load_function(computed.function)
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return function, None
    if not parameters:
        raise ConfigError(f"data.computed.{name}: {computed.function!r} takes no column; name them as its parameters")
    return function, tuple(p.name for p in parameters)


def _of(column: str, function: Callable[[Sequence[Any]], list[Any]]) -> Function:
    return lambda **columns: function(columns[column])
