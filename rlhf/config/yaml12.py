"""YAML by the rules of YAML 1.2, with the place of each key, and with clear errors.

PyYAML follows YAML 1.1. By 1.2, ``off`` is a word (``ppo.missing_eos: off``), ``1e-4`` a number, ``010`` ten
and ``2024-01-01`` text. Keys that are given twice are refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from rlhf.errors import ConfigError, show

Marks = dict[tuple[str, ...], str]
"""The place ("file:line" or "--set key") of each key of a configuration, by its path."""

DEEPEST = 8  # levels of nesting, of which the schema has five: bounds what aliases of aliases unfold to

# Pattern and first letters of each type of the core schema, https://yaml.org/spec/1.2.2/#103-core-schema
_RESOLVERS = {
    "null": (r"null|Null|NULL|~|", "nN~"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _tag, (_pattern, _first) in _RESOLVERS.items():
    for _class in (_Loader, _Dumper):
        _letters = [*_first, ""] if _tag == "null" else list(_first)
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _letters)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))  # 010 is ten


def write_value(value: Any) -> str:
    """A value on one line, as ``read_mapping`` reads it."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=2**31)
    return text.removesuffix("\n").removesuffix("\n...")


def read_mapping(text: str, place: str) -> tuple[dict[str, Any], Marks]:
    """The mapping that a YAML document holds, and the place of each key.

    Raises:
        ConfigError: it is not YAML, not a mapping, or names a key twice.
    """
    marks: Marks = {}
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                raise ConfigError(f"{place} is empty; write the sections data and model, or `preset: demo`")
            if not isinstance(root, yaml.MappingNode):
                raise ConfigError(f"{place}:{root.start_mark.line + 1}: must be lines such as `key: value`")
            return _convert(loader, root, (), marks, place), marks
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{place}:{mark.line + 1}:{mark.column + 1}" if mark else place
        lines = text.splitlines()
        excerpt = f"; the line is {show(lines[mark.line].strip())}" if mark and mark.line < len(lines) else ""
        problem = " ".join(part for part in (error.context, error.problem) if part)
        tab = "; indent with spaces, not tabs" if "\\t" in problem else ""
        raise ConfigError(f"{where}: not valid YAML: {problem}{tab}{excerpt}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError(f"{place}:{line}: not valid YAML: it has a {chr(error.character)!r} in it") from None
    except RecursionError:
        raise ConfigError(f"{place}: nested too deeply, or an alias that holds itself") from None


def _convert(loader: _Loader, node: yaml.Node, path: tuple[str, ...], marks: Marks, place: str) -> Any:
    """A node as plain data; fills ``marks``."""
    here = f"{place}:{node.start_mark.line + 1}"
    if len(path) > DEEPEST:
        raise ConfigError(f"{here}: nested too deeply; no setting lies below {'.'.join(path[:3])}")
    if isinstance(node, yaml.SequenceNode):
        return [_convert(loader, item, (*path, str(i)), marks, place) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        try:
            return loader.construct_object(node)
        except ValueError as error:
            raise ConfigError(f"{here}: {'.'.join(path)}: not valid YAML: {error}") from None
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{place}:{line}: a key is a list or mapping; put quotes around it")
        if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
            raise ConfigError(
                f"{place}:{line}:{key.start_mark.column + 1}: {'.'.join((*path, key.value))} is given twice, "
                f"first on line {lines[key.value]}; keep one of them"
            )
        lines[key.value] = line
    loader.flatten_mapping(node)
    result = {}
    for key, value in node.value:
        inner = (*path, key.value)
        marks[inner] = f"{place}:{key.start_mark.line + 1}"
        result[key.value] = _convert(loader, value, inner, marks, place)
    return result
