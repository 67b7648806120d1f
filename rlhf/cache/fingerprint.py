"""Fingerprints of code: which modules a stage really imports, and what they say.

A fingerprint is taken from the syntax tree without docstrings, so that comments, docstrings and layout change
nothing. The import closure is static: every import of a ``rlhf`` module in a file counts, also inside a function;
those under ``if TYPE_CHECKING`` do not, since they never run.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rlhf import handed_out
from rlhf.errors import ConfigError, did_you_mean
from rlhf.store.artifacts import write_json
from rlhf.store.locations import expanded

ROOT = Path(__file__).parents[2]
PACKAGE = "rlhf"
PARSES = 20  # most attempts at one file
BY_NAME = ("globals", "vars", "locals", "setattr", "exec", "modules")  # with these a file can make names as it runs

# What lies in these folders moves, locks, logs, checks and names; no number of a result comes from it, and no library
# that computes is imported there (contracts in pyproject.toml see to that). "." is the top: context, stages, errors.
WITHOUT_NUMBERS = (".", "config", "store", "tracking")


def module_file(module: str) -> Path | None:
    """The source file of a module of this package, or None if there is no such module."""
    base = ROOT.joinpath(*module.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def shapes_numbers(path: Path) -> bool:
    """Whether the code of a module is in the cache keys of what imports it: that follows from its folder alone."""
    return path.parent.relative_to(ROOT / PACKAGE).as_posix() not in WITHOUT_NUMBERS


def import_closure(module: str) -> dict[str, Path]:
    """This module and every ``rlhf`` module that running it can load, by name, those without numbers left out."""
    found: dict[str, Path] = {}
    seen: set[Named] = set()
    waiting = list(_with_parents(module))
    while waiting:
        named = waiting.pop()
        if named in seen or (path := module_file(named.module)) is None:
            continue
        seen.add(named)
        found[named.module] = path
        parsed, package = _parsed(path.read_bytes()), path.name == "__init__.py"
        waiting.extend(_named(named.module if package else named.module.rpartition(".")[0], parsed))
        if package and named.whole:
            waiting.extend(Named(home) for _, home in parsed.offers)
    return {name: path for name, path in sorted(found.items()) if name == module or shapes_numbers(path)}


def code_fingerprint(path: Path) -> str:
    """sha256 of a Python file's syntax tree, docstrings left out.

    Raises:
        ConfigError: the file is not valid Python.
    """
    with _valid(path):
        return _parsed(path.read_bytes()).fingerprint


@contextmanager
def _valid(path: Path) -> Iterator[None]:
    """Turns what a parser says of a file into a ConfigError."""
    try:
        yield
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not valid Python: {error.msg}") from None


class Parsed(NamedTuple):
    """What a Python file says: its fingerprint, what it imports as level, module and names, and what it hands out.

    ``offers`` are names with their modules, if it is the ``__init__`` of a package (see ``rlhf.lazily``).
    """

    fingerprint: str
    imports: tuple[tuple[int, str, tuple[str, ...]], ...]
    offers: tuple[tuple[str, str], ...] = ()


class Named(NamedTuple):
    """A module that another one names; of a package, whether all that it hands out may be used."""

    module: str
    whole: bool = False


_used: dict[str, Parsed] = {}  # by this process; the keys are digests of source, Python's version and this module
_recalled: dict[str, Parsed] = {}  # from earlier ones
_PARSER = f"{sys.version}\0{Path(__file__).read_text(encoding='utf-8')}".encode()


def recall(path: Path) -> None:
    """Take what earlier processes have remembered there: parsing all code anew takes half a second."""
    try:
        for name, (fingerprint, imports, offers) in dict(json.loads(path.read_text(encoding="utf-8"))).items():
            known = tuple((int(level), str(module), tuple(map(str, names))) for level, module, names in imports)
            _recalled[str(name)] = Parsed(str(fingerprint), known, tuple((str(a), str(b)) for a, b in offers))
    except (OSError, ValueError, TypeError):
        return


def remember(path: Path) -> None:
    """Write what this process has parsed or recalled, if there is more of it now; failing to only costs time later."""
    used = dict(_used)  # other threads may add to it
    if used.keys() - _recalled.keys():
        with suppress(OSError):
            write_json(path, used)
            _recalled.update(used)


def _parsed(source: bytes) -> Parsed:
    name = hashlib.sha256(_PARSER + b"\0" + source).hexdigest()
    if name not in _used:
        _used[name] = _recalled.get(name) or _parse(source)
    return _used[name]


def _parse(source: bytes) -> Parsed:
    tree = _tree(source)
    imports, offers = tuple(_imports([tree])), tuple(handed_out(tree).items())
    for node in _statements([tree]):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:]
    return Parsed(hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imports, offers)


def function_file(reference: str) -> Path:
    """The source file of a user's function named as ``package.module:function`` or ``path/to/file.py:function``.

    Nothing is imported: the module is looked up in the working folder and on ``sys.path``, the function in its syntax
    tree.

    Raises:
        ConfigError: there is no such file, module or function.
    """
    module, _, function = reference.rpartition(":")
    if not module or not function.isidentifier():
        raise ConfigError(f"{reference!r} names no function; write `module:function` or `path/to/file.py:function`")
    if module.endswith(".py"):
        path = expanded(module, repr(reference))
        if not path.is_file():
            raise ConfigError(f"{reference!r}: there is no file {path.resolve()}")
        return _with(function, path, reference)
    parts = module.split(".")
    for folder in (ROOT, Path.cwd(), *map(Path, sys.path)):
        base = folder.joinpath(*parts)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return _with(function, path, reference)
    raise ConfigError(
        f"{reference!r}: no module {module!r} in {Path.cwd()} or among the installed packages; "
        "a file can be named directly: `path/to/file.py:function`"
    )


def _with(function: str, path: Path, reference: str) -> Path:
    """The file, if it has a function of this name.

    Raises:
        ConfigError: it has none, or is not valid Python.
    """
    with _valid(path):
        names = _names(path.read_bytes())
    if names is not None and function not in names:
        raise ConfigError(
            f"{reference!r}: {path.resolve()} has no {function!r}, neither defined nor imported at its top level"
            f"{did_you_mean(function, names)}"
        )
    return path


@cache  # by content
def _names(source: bytes) -> frozenset[str] | None:
    """The names at the top level of a file; None where it may make others as it runs."""
    tree = _tree(source)
    names = set(_bound(tree))
    for node in ast.walk(tree):
        used = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
        if used in BY_NAME:
            return None
        if isinstance(node, ast.Global):
            names.update(node.names)
    return None if names & {"*", "__getattr__"} else frozenset(names)


def _bound(tree: ast.AST) -> Iterator[str]:
    """What definitions, imports and assignments bind, not those inside of functions and classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        else:
            yield from _bound(node)


def _named(package: str, parsed: Parsed) -> Iterator[Named]:
    """Our modules that a module in ``package`` may import, parents included (their ``__init__`` runs too)."""
    above = package.split(".")
    for level, module, names in parsed.imports:
        base = ".".join([*above[: len(above) - level + 1], *filter(None, [module])]) if level else module
        if base.partition(".")[0] != PACKAGE:
            continue
        yield from _with_parents(base, whole=not names)
        face = module_file(base)
        offers = dict(_parsed(face.read_bytes()).offers) if face is not None and face.name == "__init__.py" else {}
        yield from (Named(offers[name]) if name in offers else Named(f"{base}.{name}", whole=True) for name in names)


def _with_parents(module: str, whole: bool = False) -> Iterator[Named]:
    parts = module.split(".")
    yield from (Named(".".join(parts[:length])) for length in range(1, len(parts)))
    yield Named(module, whole)


def _tree(source: bytes) -> ast.Module:
    """The syntax tree of a file.

    Python 3.11 counts the depth of all trees that are being made in one place, and says SystemError when another thread
    has begun one meanwhile (https://github.com/python/cpython/issues/106905). Prefect's threads do, now and then.

    Raises:
        SyntaxError: the file is not valid Python.
    """
    for _ in range(PARSES - 1):
        try:
            return ast.parse(source)
        except SystemError:
            time.sleep(0.01)
    return ast.parse(source)


def _imports(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """The imports in these statements that run, those in functions too: level, module and names of each."""
    for node in nodes:
        match node:
            case ast.Import(names):
                yield from ((0, alias.name, ()) for alias in names)
            case ast.ImportFrom(module, names, level):
                yield level, module or "", tuple(alias.name for alias in names)
            case ast.If(test) if "TYPE_CHECKING" in ast.unparse(test):
                yield from _imports(node.orelse)
            case _:
                yield from _imports(_inside(node))


def _statements(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """These, and all statements in them."""
    for node in nodes:
        yield node
        yield from _statements(_inside(node))


def _inside(node: ast.AST) -> Iterator[ast.AST]:
    """The statements right inside of one, and what holds some in turn (``except``, ``case``). No expression does."""
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        yield from getattr(node, field, ())
