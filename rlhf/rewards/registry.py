"""The rewards that come with this project, by name. A configuration names one in place of a function of its own.

A built-in is a reward function whose keyword-only parameters are its arguments; the data columns reach it through
``**columns``. Its modules are imported by name, so that only a stage which uses a built-in has its code in its cache
key, and neither a plan nor the PPO engine loads what a built-in needs.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar, get_type_hints

from rlhf.errors import ConfigError, did_you_mean

MODEL = "model"  # the name of the trained reward model, which is no function
_MODULES = ("builtin", "builtin_models")

F = TypeVar("F", bound=Callable[..., list[float]])


@dataclass(frozen=True)
class Builtin:
    """A built-in reward; ``libraries`` are the distributions whose versions shape its numbers."""

    function: Callable[..., list[float]]
    libraries: tuple[str, ...] = ()
    check: Callable[..., None] | None = None  # raises ValueError for arguments that cannot work

    @property
    def reference(self) -> str:
        """Its function as ``module:function``."""
        return f"{self.function.__module__}:{self.function.__name__}"

    @property
    def defaults(self) -> dict[str, Any]:
        """Its arguments by name; ``inspect.Parameter.empty`` where one must be given."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def types(self) -> dict[str, Any]:
        """The type of each argument."""
        hints = get_type_hints(self.function)
        return {name: hints[name] for name in self.defaults}

    def check_names(self, arguments: Mapping[str, Any]) -> None:
        """See that it takes the arguments and gets those that it needs.

        Raises:
            ConfigError: an argument is unknown, or a required one is missing.
        """
        name, takes = self.function.__name__, self.defaults
        for given in arguments:
            if given not in takes:
                raise ConfigError(
                    f"arguments.{given}: {name} takes no such argument; it takes {', '.join(takes) or 'none'}"
                    f"{did_you_mean(given, takes)}"
                )
        for wanted, default in takes.items():
            if default is inspect.Parameter.empty and wanted not in arguments:
                raise ConfigError(f"arguments.{wanted} is missing; {name} needs it")


_builtins: dict[str, Builtin] = {}


def builtin(*libraries: str, check: Callable[..., None] | None = None) -> Callable[[F], F]:
    """Register a function as the built-in of its name.

    Raises:
        ValueError: there is one of this name already.
    """

    def add(function: F) -> F:
        name = function.__name__
        if name in _builtins or name == MODEL:
            raise ValueError(f"there is a built-in reward {name!r} already; choose another name")
        _builtins[name] = Builtin(function, libraries, check)
        return function

    return add


def builtins() -> Mapping[str, Builtin]:
    """All of them, by name."""
    for module in _MODULES:
        import_module(f"rlhf.rewards.{module}")
    return _builtins


def find(name: str) -> Builtin:
    """The built-in of a name.

    Raises:
        ConfigError: there is none.
    """
    known = builtins()
    if name not in known:
        raise ConfigError(
            f"function {name!r} is no built-in reward ({', '.join(sorted(known))}), and a function of your own is "
            f"`module:function` or `path/file.py:function`{did_you_mean(name, known)}"
        )
    return known[name]


def is_builtin(name: str) -> bool:
    """Whether a configuration means a built-in by this name."""
    return name != MODEL and ":" not in name


def labels(names: Iterable[str]) -> dict[str, str]:
    """What each of several rewards is called: its name, of a ``module:function`` the function's where that is clear.

    Raises:
        ConfigError: two would be called the same.
    """
    names = list(names)
    functions = Counter(name.rpartition(":")[2] for name in names)
    found: dict[str, str] = {}
    for name in names:
        label = name.rpartition(":")[2]
        if functions[label] > 1 and ":" in name:
            label = name.replace(":", ".").replace("/", ".").lstrip(".")
        if label in found.values():
            raise ConfigError(f"two rewards would be called {label!r}; name one otherwise, and set its function")
        found[name] = label
    return found
