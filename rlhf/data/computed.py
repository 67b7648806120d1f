"""Columns that are computed from others, by functions that are built in or the user's own."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rlhf.data.settings import Computed
from rlhf.errors import ConfigError

Function = Callable[..., Sequence[Any]]  # lists of values by name of column -> a value for each row


def word_count(texts: Sequence[str]) -> list[int]:
    """Number of words of each text, as the reward ``exact_word_count`` counts them."""
    from rlhf.text import word_count as words

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


def make(name: str, computed: Computed) -> tuple[Function, tuple[str, ...] | None]:
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
