"""The rule that knows the truth about the embedded demo's data.

The rule, `gold_score`, sees the facts of a notice, which no model does. Evaluation alone uses it, to tell whether a
higher reward means a better summary. Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

GLUE_WORDS = 5  # what a sentence needs beside its facts: "will", "in", "on" and up to two more
DECAY_WORDS = 8.0  # a summary this many words too long keeps 1/e of its score
INVENTED_FACTOR = 0.7  # each invented word keeps this share of the score

# Words that carry no fact, so a summary may add them freely (at the price of its length).
_FUNCTION_WORDS = """
    a about all also an and announce are as at be been being by can do does everybody everyone everything for from
    going has have here in indeed inform is it its keep know let mind namely news no not note notice now of on once
    or our out please said say says should so some take takes that the their them then there these they this those
    to until up us was we were what when where which while who will with would you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


def gold_score(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    who: Sequence[str],
    what: Sequence[str],
    where: Sequence[str],
    when: Sequence[str],
    **columns: Sequence[object],
) -> list[float]:
    """How good each summary is, in [0, 1], given the facts of its notice. Every argument has one entry per row.

        score = kept^2 * 0.7^invented * exp(-excess / 8)

    kept      mean over the four facts: 1 if its words stand in the response side by side and in order, else half
              the share of its content words that stand anywhere in it
    invented  number of different words of the response that are neither in the notice nor function words
    excess    number of words beyond those of the four facts plus 5

    So a complete summary of normal length scores 1, an empty one 0, and one that repeats itself to a limit of 50
    words less than 0.05. Case and punctuation do not matter. On the generated data a clean summary outranks each
    flaw: the means are in data/README.md. `columns` takes whatever else the data set has, and is ignored.

    Raises:
        ValueError: the arguments differ in length.
    """
    return [
        _score(_words(prompt), _words(response), [_words(fact) for fact in facts])
        for prompt, response, *facts in zip(prompts, responses, who, what, where, when, strict=True)
    ]


def _score(notice: list[str], response: list[str], facts: list[list[str]]) -> float:
    kept = sum(_kept(fact, response) for fact in facts) / len(facts)
    content = [word for word in response if word not in FUNCTION_WORDS]
    invented = len(set(content) - set(notice))
    needed = sum(map(len, facts)) + GLUE_WORDS
    excess = max(0, len(response) - needed)
    return float(kept**2 * INVENTED_FACTOR**invented * math.exp(-excess / DECAY_WORDS))


def _kept(fact: list[str], response: list[str]) -> float:
    """1 if the fact is in the response word by word, else half the share of its content words that are."""
    starts = range(len(response) - len(fact) + 1)
    if any(response[start : start + len(fact)] == fact for start in starts):
        return 1.0
    content = [word for word in fact if word not in FUNCTION_WORDS]
    return 0.5 * sum(word in response for word in content) / len(content)


def _words(text: str) -> list[str]:
    """The words in lower case, without punctuation."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())
