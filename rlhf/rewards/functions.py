"""Reward functions: how one is loaded and called, and what its errors say."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from rlhf.errors import ConfigError, RewardError, did_you_mean
from rlhf.rewards import registry
from rlhf.store.locations import expanded

RewardFunction = Callable[..., Sequence[float]]
_sources: dict[str, bytes] = {}  # of the files that are loaded, by the name of the module


class Scorer(Protocol):
    """One number for each response of a batch."""

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float]:
        """Score a batch; all sequences have one entry a row."""


# -------------------------------------------------------------------------------------------------------------- loading
def make_scorer(function: str, arguments: Mapping[str, Any] | None = None) -> FunctionScorer:
    """The built-in or the user's function of this name, with its arguments.

    Raises:
        ConfigError: it cannot be loaded, or does not take these arguments.
    """
    given = dict(arguments or {})
    if registry.is_builtin(function):
        builtin = registry.find(function)
        builtin.check_names(given)
        return FunctionScorer(builtin.function, function, builtin.defaults | given)  # all: no column is taken for one
    loaded = load_function(function)
    _check_arguments(loaded, function, given)
    return FunctionScorer(loaded, function, given)


def load_function(name: str) -> RewardFunction:
    """Import ``module:function`` or ``path/file.py:function``; a relative path starts at the working directory.

    Raises:
        ConfigError: the name has another form, or there is no such module, file or function, or its import fails.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ConfigError(f"{name!r} does not name a function; write `module:function` or `path/file.py:function`")
    try:
        module = _load_file(expanded(place, repr(name))) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # a user's module may raise anything on import
        raise ConfigError(
            f"{name!r}: {place} cannot be imported: {type(error).__name__}: {error}. "
            "A module must be on the Python path; a file is named by its path, ending in .py"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = ", ".join(sorted(key for key, value in vars(module).items() if inspect.isfunction(value)))
        raise ConfigError(f"{name!r}: {place} has no function {attribute!r}; it has {found or 'none'}")
    return function  # type: ignore[no-any-return]


def _check_arguments(function: RewardFunction, name: str, arguments: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some callables have no signature
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    takes = list(parameters)[2:]
    for argument in arguments:
        if argument not in takes:
            takes_none = "none beside the texts"
            raise ConfigError(
                f"{name!r} takes no argument {argument!r}; it takes {', '.join(takes) or takes_none}"
                f"{did_you_mean(argument, takes)}"
            )


def _load_file(path: Path) -> ModuleType:
    """The module of a file. It is run once, and again only where the file has changed.

    It is registered as other modules are, since dataclasses and pickle look there, but by a name of its own: files of
    one name, and modules that are called as a file is, stay apart.
    """
    path = path.absolute()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    source = path.read_bytes()
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    if name in sys.modules and _sources.get(name) == source:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # its name ends in .py
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:  # not by the loader, which would take a changed file of the same second and size from its cache
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except BaseException:
        sys.modules.pop(name, None)
        raise
    _sources[name] = source
    return module


# -------------------------------------------------------------------------------------------------------------- calling
def call_reward(
    function: RewardFunction,
    name: str,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    arguments: Mapping[str, Any] | None = None,
) -> list[float]:
    """Call a reward function and see that it gave one finite number a row.

    It gets the columns that it takes, one entry a row, and the arguments as they are. An argument hides a column of
    its name.

    Raises:
        RewardError: it raised, or gave something else. The message names the function and the first bad row.
    """
    given = dict(arguments or {})
    columns = {key: values for key, values in _accepted(function, columns).items() if key not in given}
    try:
        result = function(list(prompts), list(responses), **columns, **given)
    except Exception as error:
        row = _first_failing(function, prompts, responses, columns, given)
        where = "the batch" if row is None else describe_row(row, prompts, responses)
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error}; on {where}") from error
    try:
        values = list(result)
    except TypeError as error:
        raise RewardError(
            f"reward {name!r} returned {type(result).__name__}; it must return a list of {len(responses)} numbers"
        ) from error
    if len(values) != len(responses):
        raise RewardError(f"reward {name!r} returned {len(values)} numbers for {len(responses)} responses")
    return [_number(value, name, row, prompts, responses) for row, value in enumerate(values)]


def _accepted(function: RewardFunction, columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The columns that a function takes: all, if it has ``**columns``."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in callables have no signature
        return {}
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    positional = list(parameters)[:2]
    return {
        key: list(values)
        for key, values in columns.items()
        if (takes_all or key in parameters) and key not in positional
    }


def _first_failing(
    function: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    arguments: Mapping[str, Any],
) -> int | None:
    """The first row that a function fails on when it gets this row only."""
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            function([prompt], [response], **{key: [values[row]] for key, values in columns.items()}, **arguments)
        except Exception:
            return row
    return None


def _number(value: Any, name: str, row: int, prompts: Sequence[str], responses: Sequence[str]) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        where = describe_row(row, prompts, responses)
        raise RewardError(f"reward {name!r} returned {value!r}, which is not a number, for {where}") from error
    if not math.isfinite(number):
        raise RewardError(f"reward {name!r} returned {number}, for {describe_row(row, prompts, responses)}")
    return number


def describe_row(row: int, prompts: Sequence[str], responses: Sequence[str]) -> str:
    """A row for a message."""
    return f"row {row}: prompt {prompts[row][-60:]!r}, response {responses[row][:60]!r}"


@dataclass(frozen=True)
class FunctionScorer:
    """A reward function with the name that its errors carry, and the arguments of every call."""

    function: RewardFunction
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float]:
        return call_reward(self.function, self.name, prompts, responses, columns, self.arguments)
