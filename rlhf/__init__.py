"""RLHF as a library: everything that knows about text, models and learning. No orchestration in here."""

import ast
import functools
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def lazily(package: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package that hands out the names which its ``__init__`` imports under TYPE_CHECKING.

    The module of a name loads when the name is asked for, so that a configuration is read without loading torch.
    """

    @functools.cache
    def names() -> dict[str, str]:
        return handed_out(ast.parse(Path(import_module(package).__file__ or "").read_bytes()))

    def get(name: str) -> Any:
        if (home := names().get(name)) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home), name)

    return get


def handed_out(tree: ast.Module) -> dict[str, str]:
    """The module of each name that the tree of a package's ``__init__`` imports under TYPE_CHECKING."""
    blocks = (node for node in tree.body if isinstance(node, ast.If))
    imports = (node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom))
    return {alias.name: node.module or "" for node in imports for alias in node.names}
