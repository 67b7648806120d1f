"""The exceptions that a user may see. Each message says what is wrong, where, the value, what is allowed, what to do.

Every class is also a standard type, so that code that does not know this project catches it too, and every
instance pickles, so that it crosses process boundaries.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class RlhfError(Exception):
    """Base of everything that this project raises on purpose."""


class InputError(RlhfError, ValueError):
    """Something the user gave is wrong; the command line ends with exit code 2."""


class ConfigError(InputError):
    """The configuration cannot be read, or cannot work."""


class DataError(InputError):
    """A data file cannot be read, or a row of it is bad."""


class ModelError(InputError):
    """A model or tokenizer cannot be loaded, or does not fit the rest of the configuration."""


class RewardError(RlhfError, ValueError):
    """A reward or scoring function failed, or returned something that is not one finite number a row."""


class NotCachedError(InputError):
    """A stage was asked to come from the cache (``--only``, ``--from``) and is not there."""


class ArtifactError(RlhfError, OSError):
    """An artifact is missing, incomplete or damaged."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class StorageError(RlhfError, OSError):
    """A disk is full, or the shared store cannot be read or written."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class StoppedError(RlhfError, RuntimeError):
    """A training was asked to end, and did, with a checkpoint from which it goes on."""


class TrainingError(RlhfError, ArithmeticError):
    """Training cannot go on: a loss, reward or gradient is not finite."""


def show(value: Any, length: int = 60) -> str:
    """A value for a message, on one line and shortened."""
    text = "nothing (null)" if value is None else repr(value)
    return text if len(text) <= length else f"{text[: length - 4]}...{text[-1]}"


def did_you_mean(word: str, words: Iterable[str], what: str = "") -> str:
    """``"; did you mean 'x'?"``, or nothing where no word is close."""
    by_lower = {other.lower(): other for other in words}
    close = get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean {what}{by_lower[close[0]]!r}?" if close else ""
