"""Built-in rewards that are rules over texts. Each gives one number a row; docs/rewards.md says what they are good for.

What a row needs and does not have is a ValueError here, and by ``call_reward`` a RewardError that names the row. What
a rule needs beside the standard library loads when it is called.
"""

from __future__ import annotations

import ast
import math
import re
import textwrap
import warnings
from collections.abc import Sequence
from decimal import Decimal
from functools import cache
from typing import Any, Literal

from rlhf.rewards.registry import builtin

FULL_MARK = 3  # different markers that make a text as polite, or as rude, as it can be
POLITE = (
    "appreciate", "apologies", "could you", "excuse me", "glad to", "grateful", "happy to", "kindly", "may i", "please",
    "pleased to", "sorry", "thank you", "thanks", "welcome", "would you",
)  # fmt: skip
RUDE = (
    "crap", "damn", "dumb", "fool", "garbage", "get lost", "idiot", "idiotic", "moron", "nonsense", "pathetic",
    "ridiculous", "shut up", "stupid", "useless", "worthless",
)  # fmt: skip

# Capitalised where a sentence begins, and no name.
_FUNCTION_WORDS = """
    a about after all also although an and any are as at be because been before both but by can did do does each every
    few first finally for from had has have he her here hers his how however i if in into is it its just last many may
    me more most my no not now of on once one or other our out over please second she should since so some such than
    that the their them then there these they this those though to under until up us was we were what when where
    whether which while who why will with would yes yet you your
    """
_NO_NAMES = frozenset(_FUNCTION_WORDS.split())
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_WORD = re.compile(r"[^\W\d_][\w-]*")
_FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


# --- length -----------------------------------------------------------------------------------------------------------
@builtin("spacy")
def exact_word_count(
    prompts: Sequence[str], responses: Sequence[str], *, column: str = "target_words", **columns: Sequence[Any]
) -> list[float]:
    """exp(-0.7 |target - words| + ln 2) - 1, in (-1, 1]: 1 at the target, -0.007 one word off, towards -1 far from it.

    The target is a number in ``column``; words are counted by ``rlhf.metrics.word_count.word_count``.
    """
    from rlhf.metrics.word_count import word_count

    targets = [_target(value, column) for value in _column(columns, column)]
    return [
        math.exp(-0.7 * abs(target - word_count(response)) + math.log(2.0)) - 1.0
        for target, response in zip(targets, responses, strict=True)
    ]


@builtin()
def brevity(prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """Minus the number of words, which white space separates: 0 for an empty response."""
    return [-float(len(response.split())) for response in responses]


# --- words ------------------------------------------------------------------------------------------------------------
@builtin()
def politeness(prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """(polite - rude) / 3, clipped to [-1, 1]: the *different* markers of ``POLITE`` and ``RUDE`` in a response.

    Each counts once, as whole words in any case, so that repeating one gains nothing.
    """

    def different(markers: Sequence[str], text: str) -> int:
        return sum(_has_word(text, marker) for marker in markers)

    balance = [different(POLITE, response) - different(RUDE, response) for response in responses]
    return [max(-1.0, min(1.0, value / FULL_MARK)) for value in balance]


def _check_keywords(words: Sequence[str], regex: str | None = None) -> None:
    if not words and regex is None:
        raise ValueError("arguments.words is empty and there is no regex; name at least one word")
    if any(not word.strip() for word in words):
        raise ValueError("arguments.words has an empty word; take it out")
    try:
        re.compile(regex or "")
    except re.error as error:
        raise ValueError(f"arguments.regex is {regex!r}; it is no regular expression: {error}") from None


@builtin(check=_check_keywords)
def keywords(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    words: list[str],
    regex: str | None = None,
    **columns: Sequence[Any],
) -> list[float]:
    """Share of ``words`` that a response has, in [0, 1]; a ``regex`` counts like one more word.

    Case does not matter. A word is found as whole words; the pattern anywhere (``re.search``).
    """
    _check_keywords(words, regex)
    pattern = None if regex is None else re.compile(regex, re.IGNORECASE)

    def share(text: str) -> float:
        found = sum(_has_word(text, word) for word in words)
        found += pattern is not None and pattern.search(text) is not None
        return found / (len(words) + (pattern is not None))

    return [share(response) for response in responses]


# --- against a reference ----------------------------------------------------------------------------------------------
@builtin("rouge-score", "nltk")
def similarity(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    column: str = "reference",
    metric: Literal["rouge1", "rouge2", "rougeL"] = "rougeL",
    **columns: Sequence[Any],
) -> list[float]:
    """ROUGE F1 against the text in ``column``, in [0, 1] (Lin 2004; stemmed, see ``rlhf.metrics.rouge``)."""
    from rlhf.metrics import rouge

    references = reference_texts(columns, column)
    scores: list[float] = rouge(responses, references)[metric].tolist()
    for score, reference in zip(scores, references, strict=True):
        if math.isnan(score):
            raise ValueError(f"the column {column!r} is {reference[:60]!r} here, which has no letter a-z and no digit")
    return scores


@builtin()
def factuality(
    prompts: Sequence[str], responses: Sequence[str], *, column: str = "reference", **columns: Sequence[Any]
) -> list[float]:
    """F1 of the facts of a response and of the text in ``column``: 2 |both| / (|one| + |other|), in [0, 1].

    Facts are the different numbers and the capitalised words that are no function words (``facts``). So both leaving
    out a fact and inventing one cost; 1 where neither text has any.
    """

    def f1(response: str, reference: str) -> float:
        found, wanted = facts(response), facts(reference)
        return 2 * len(found & wanted) / (len(found) + len(wanted)) if found or wanted else 1.0

    return [f1(*pair) for pair in zip(responses, reference_texts(columns, column), strict=True)]


def facts(text: str) -> set[str | Decimal]:
    """The different numbers of a text (1,000.0 is 1000) and its capitalised words, in lower case."""
    numbers = {Decimal(number.replace(",", "")).normalize() for number in _NUMBER.findall(text)}
    names = {word.lower() for word in _WORD.findall(text) if word[0].isupper()}
    return numbers | (names - _NO_NAMES)


# --- code -------------------------------------------------------------------------------------------------------------
@builtin("pycodestyle")
def pep8(prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """Minus the violations of PEP 8 per line of code, at least -1; -1, too, for what is no Python or has no code.

    Violations are those that pycodestyle reports by default; lines that are blank do not count. Of a response with code
    fences (three backticks), the code is what they enclose; indentation that all lines share is left out.
    """
    return [_style(response) for response in responses]


def _style(response: str) -> float:
    import pycodestyle

    fenced = _FENCED.findall(response)
    code = textwrap.dedent("\n\n\n".join(fenced) if fenced else response).strip("\n").rstrip() + "\n"
    lines = code.splitlines(keepends=True)
    size = sum(not line.isspace() for line in lines)
    if not size or not _parses(code):
        return -1.0
    options = _pycodestyle_options()
    violations: int = pycodestyle.Checker("response", lines, options, pycodestyle.BaseReport(options)).check_all()
    return 0.0 - min(1.0, violations / size)  # not -0.0


def _parses(code: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes
        try:
            ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


@cache
def _pycodestyle_options() -> Any:
    """The defaults of pycodestyle, whatever a configuration file of this machine says."""
    import pycodestyle

    defaults = {"max_line_length": 79, "max_doc_length": None, "indent_size": 4, "hang_closing": False}
    ignored = tuple(pycodestyle.DEFAULT_IGNORE.split(","))
    return pycodestyle.StyleGuide(quiet=2, select=(), ignore=ignored, **defaults).options


# --- what a row needs -------------------------------------------------------------------------------------------------
def _column(columns: dict[str, Sequence[Any]], name: str) -> Sequence[Any]:
    if name not in columns:
        raise ValueError(
            f"the data has no column {name!r} (it has {', '.join(columns) or 'none'}); "
            "add it to the prompt files, or name another with the argument `column`"
        )
    return columns[name]


def reference_texts(columns: dict[str, Sequence[Any]], name: str) -> list[str]:
    values = _column(columns, name)
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"the column {name!r} is {value!r} here; it must be a text")
    return list(values)


def _target(value: Any, column: str) -> float:
    try:
        target = float(value)
    except (TypeError, ValueError):
        target = math.nan
    if isinstance(value, bool) or not math.isfinite(target) or target < 0:
        raise ValueError(f"the column {column!r} is {value!r} here; it must be a number of words")
    return target


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)", text, re.IGNORECASE) is not None
