"""Words for what is wrong with a user's input: where it is, the value, what is allowed, what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from rlhf.config.fields import FunctionSpec, Section
from rlhf.config.pipeline import PipelineConfig
from rlhf.config.yaml12 import Marks
from rlhf.errors import did_you_mean, show

_ALLOWED = {
    "missing": "is missing",
    "string": "must be text; put quotes around it",
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "tuple": "must be a list such as [a, b]",
    "dict": "must be a mapping such as {{name: value}}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "finite_number": "must be finite",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must match {pattern}",
    "literal_error": "must be one of {expected}",
}
"""What is allowed, by pydantic's error type or the word it begins with (``int_parsing``)."""


def explain(error: ValidationError, marks: Marks, name: str) -> list[str]:
    """One line for each error of the schema; ``name`` is the place of what has no mark."""
    lines = []
    for entry in error.errors(include_url=False):
        location = tuple(str(part) for part in entry["loc"] if part != "[key]")
        lines.append(_line(entry, location, marks, name))
    return lines


def _line(entry: Mapping[str, Any], location: tuple[str, ...], marks: Marks, name: str) -> str:
    kind, value = entry["type"], entry["input"]
    key = ".".join(location)
    if kind == "value_error":
        message = str(entry["ctx"]["error"])
        about_field = message.partition(" ")[0].strip(":").split(".")  # checks begin with the field
        place = _place((*location, *about_field), marks, name)
        return f"{_where(place, key)}{': ' if key else ''}{message}"
    where = _where(_place(location, marks, name), key)
    if kind == "extra_forbidden":
        return f"{where}: unknown key{_known(location)}"
    info = _field(location)
    allowed = _ALLOWED.get(kind) or _ALLOWED.get(kind.split("_")[0]) or entry["msg"]
    if kind == "model_type":
        section = _section(location)
        plain = f"a plain {section.PLAIN} or " if issubclass(section, FunctionSpec) else ""
        allowed = f"must be {plain}a section with the keys {', '.join(section.model_fields)}"
    hint = did_you_mean(str(value), _words(info)) if kind == "literal_error" else ""
    about = f" ({info.description.rstrip('.')})" if info is not None and info.description else ""
    given = "" if kind == "missing" else f"is {show(value)}; "
    return f"{where}: {given}{allowed.format(**entry.get('ctx', {}))}{hint}{about}"


def _place(location: tuple[str, ...], marks: Marks, name: str) -> str:
    for length in range(len(location), 0, -1):
        if location[:length] in marks:
            return marks[location[:length]]
    return name


def _where(place: str, key: str) -> str:
    """Place and key; an override's place is its key already."""
    return place if place == f"--set {key}" else f"{place}: {key}"


def _walk(location: tuple[str, ...]) -> Iterator[tuple[type[Section], Any]]:
    """The section at each step of the way to a key, and the field that led there (None for an entry of a mapping)."""
    model: type[Section] = PipelineConfig
    parts = iter(location)
    for part in parts:
        info = model.model_fields.get(part)
        if info is None:
            return
        kinds = [kind for kind in (info.annotation, *get_args(info.annotation)) if isinstance(kind, type)]
        inner = next((kind for kind in kinds if issubclass(kind, Section)), None)
        if inner is None or (inner is not info.annotation and next(parts, None) is None):
            yield model, info
            return
        model = inner
        yield model, info


def _section(location: tuple[str, ...]) -> type[Section]:
    """The deepest section on the way to a key; an entry of a mapping of sections is one."""
    return ([PipelineConfig] + [section for section, _ in _walk(location)])[-1]


def _field(location: tuple[str, ...]) -> Any:
    """The field at a key, or around it where the key is an item of a list or dictionary."""
    return ([None] + [info for _, info in _walk(location)])[-1]


def _words(info: Any) -> list[str]:
    return [str(word) for word in getattr(info.annotation, "__args__", ())] if info is not None else []


def _known(location: tuple[str, ...]) -> str:
    """What an unknown key may have been meant to be: one like it in its section, or the same elsewhere."""
    key, section = location[-1], _section(location[:-1])
    if hint := did_you_mean(key, section.model_fields):
        return hint
    elsewhere = [key] if key in PipelineConfig.model_fields else []
    for name in PipelineConfig.model_fields:
        other = _section((name,))
        if other is not PipelineConfig and key in other.model_fields:
            elsewhere.append(f"{name}.{key}")
    if elsewhere and len(elsewhere) <= 3:
        return f"; did you mean {' or '.join(repr(name) for name in elsewhere)}?"
    return f"; known keys: {', '.join(section.model_fields)}"
