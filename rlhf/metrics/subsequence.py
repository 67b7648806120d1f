"""Longest common subsequences of token lists by bits: exact, and fast for texts of 10,000 tokens.

A table has n x m entries, 10^8 steps of Python for two such texts. Here a column of the table is one integer: bit i is
0 where the subsequence grows from row i to row i + 1, and a step to the next column is an addition, a subtraction and
two bitwise operations on n bits (Crochemore, Iliopoulos, Pinzon and Reid 2001; Hyyrö 2004).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

Token = TypeVar("Token", bound=Hashable)


def lcs_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence of two lists."""
    *_, last = _columns(_places(a), _full(a), b)
    return len(a) - last.bit_count()


def union_lcs(reference: Sequence[Token], candidates: Sequence[Sequence[Token]]) -> list[Token]:
    """The tokens of ``reference`` that are in its longest common subsequence with any of ``candidates``, in order.

    Of several longest subsequences, the one that `rouge_score` finds going back from the end: it moves to the
    previous token of the candidate where that alone keeps the length, else to the previous one of the reference.
    """
    places, full, union = _places(reference), _full(reference), 0
    for candidate in candidates:
        if not places.keys().isdisjoint(candidate):
            union |= _backtracked(reference, candidate, list(_columns(places, full, candidate)))
    return [token for row, token in enumerate(reference) if union >> row & 1]


def _backtracked(reference: Sequence[Hashable], candidate: Sequence[Hashable], columns: list[int]) -> int:
    """The rows of the reference in one longest common subsequence, as bits."""
    rows, i, j = 0, len(reference), len(candidate)
    while i and j:
        if reference[i - 1] == candidate[j - 1]:
            i, j = i - 1, j - 1
            rows |= 1 << i
        elif columns[j] >> (i - 1) & 1:  # as long without this token of the reference
            i -= 1
        else:
            j -= 1
    return rows


def _columns(places: Mapping[Hashable, int], full: int, tokens: Sequence[Hashable]) -> Iterator[int]:
    """The table's columns: the first, of nothing, and the one after each of ``tokens``."""
    column = full
    yield column
    for token in tokens:
        if matches := column & places.get(token, 0):
            column = ((column + matches) | (column - matches)) & full
        yield column


def _places(tokens: Sequence[Hashable]) -> dict[Hashable, int]:
    """Where each token occurs, as bits."""
    places: defaultdict[Hashable, int] = defaultdict(int)
    for row, token in enumerate(tokens):
        places[token] |= 1 << row
    return places


def _full(tokens: Sequence[Hashable]) -> int:
    return (1 << len(tokens)) - 1
