"""What is counted in a text."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spacy.tokenizer import Tokenizer


def word_count(text: str) -> int:
    """Number of words: the tokens of spaCy's blank English tokenizer that are neither punctuation nor white space.

    ``don't`` is two words (``do``, ``n't``), ``e.g.`` and ``3.5`` are one, ``a-b`` is two.
    """
    return sum(not (token.is_punct or token.is_space) for token in _tokenizer()(text))


@cache
def _tokenizer() -> Tokenizer:
    import spacy  # takes seconds

    return spacy.blank("en").tokenizer
