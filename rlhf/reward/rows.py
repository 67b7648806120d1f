"""What a reward model learns from and is measured on, as token ids: preference pairs, ratings, references.

``preferences/*.parquet`` have the columns prompt, chosen, rejected and, if the data has them, ``margin`` (how much
better, null for 0) and ``ranking`` (pairs of one ranking of several responses stand next to each other and have the
same number). ``ratings/*.parquet`` have prompt, response and ``score``. Both come from the judge where it writes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.parquet as pq
from datasets import Dataset

from rlhf.errors import DataError
from rlhf.models.score_input import score_token_ids, usable_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.context import Context

REFERENCES = 2000  # SFT references that the mean score is taken over, at most
Tokens = list[list[int]]


class Pairs(NamedTuple):
    """N preference pairs."""

    chosen: Tokens
    rejected: Tokens
    margin: list[float]  # how much better the chosen side is; 0 where the data does not say
    ranking: list[int]  # the same for the pairs of one ranking, which are neighbours
    chosen_first: list[bool]  # whether the chosen response has the smaller hash: an order that knows no label

    def first(self, rows: int) -> Pairs:
        """The first rows, at most that many."""
        return Pairs(*(column[:rows] for column in self))  # type: ignore[arg-type]


class Ratings(NamedTuple):
    """N rated texts."""

    texts: Tokens
    score: list[float]  # in the data's own units

    def first(self, rows: int) -> Ratings:
        """The first rows, at most that many."""
        return Ratings(self.texts[:rows], self.score[:rows])


@dataclass(frozen=True)
class Reader:
    """Reads the inputs of a reward stage for one model and its tokenizer."""

    context: Context
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel

    def pairs(self, split: str) -> Pairs:
        """The preference pairs of a split; none where the data has none.

        Raises:
            DataError: a text is longer than the model's context, or the pairs of a ranking are not neighbours.
        """
        columns = self._columns("preferences", split, ("prompt", "chosen", "rejected", "margin", "ranking"))
        chosen, rejected = columns["chosen"], columns["rejected"]
        return Pairs(
            self._tokens(columns["prompt"], chosen, f"chosen texts of preferences/{split}"),
            self._tokens(columns["prompt"], rejected, f"rejected texts of preferences/{split}"),
            [margin or 0.0 for margin in columns.get("margin", [0.0] * len(chosen))],
            ranking_numbers(columns.get("ranking", [None] * len(chosen)), f"preferences/{split}"),
            [_hash(one) < _hash(other) for one, other in zip(chosen, rejected, strict=True)],
        )

    def ratings(self, split: str) -> Ratings:
        """The rated responses of a split; none where the data has none.

        Raises:
            DataError: a text is longer than the model's context.
        """
        columns = self._columns("ratings", split, ("prompt", "response", "score"))
        texts = self._tokens(columns["prompt"], columns["response"], f"ratings/{split}")
        return Ratings(texts, [float(score) for score in columns["score"]])

    def references(self) -> Tokens:
        """The first demonstrations of the training split; none where the data has none.

        Raises:
            DataError: a text is longer than the model's context.
        """
        columns = self._columns("demonstrations", "train", ("prompt", "response"))
        prompts, responses = (columns[name][:REFERENCES] for name in ("prompt", "response"))
        return self._tokens(prompts, responses, "demonstrations/train")

    def _columns(self, kind: str, split: str, names: Sequence[str]) -> dict[str, list[Any]]:
        """The columns of those names that a file has; empty ones where there is no file."""
        stages = ("prepare",) if kind == "demonstrations" else ("judge", "prepare")
        for path in (f"{stage}/{kind}/{split}.parquet" for stage in stages):
            if self.context.has(path):
                file = pq.ParquetFile(self.context.input(path))
                columns: dict[str, list[Any]] = file.read(
                    [n for n in names if n in file.schema_arrow.names]
                ).to_pydict()
                return columns
        return {name: [] for name in names}

    def _tokens(self, prompts: Sequence[str], responses: Sequence[str], what: str) -> Tokens:
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return token_rows(texts, self.tokenizer, self.model, what)


def token_rows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, what: str) -> Tokens:
    """Token ids of texts as a reward model reads them, none of them too long for it.

    Raises:
        DataError: a text is longer than the model's context.
    """
    rows, limit = score_token_ids(tokenizer, texts), usable_length(model)
    for number, row in enumerate(rows, start=1):
        if limit is not None and len(row) > limit:
            raise DataError(
                f"{what}, row {number}: prompt, response and end-of-sequence are {len(row)} tokens, but the reward "
                f"model reads at most {limit}; lower data.max_prompt_tokens or data.max_response_tokens"
            )
    return rows


def ranking_numbers(given: Sequence[int | None], what: str) -> list[int]:
    """Numbers 0, 1, ... of the rankings that rows belong to; a row without a number is a ranking by itself.

    Raises:
        DataError: rows of one ranking are not neighbours, so that a split between them would go unseen.
    """
    numbers: list[int] = []
    seen: set[int] = set()
    for row, number in enumerate(given):
        if number is not None and row and number == given[row - 1]:
            numbers.append(numbers[-1])
            continue
        if number in seen:
            raise DataError(
                f"{what}, row {row + 1}: ranking {number} goes on after rows of other rankings; "
                "the pairs of one ranking must stand next to each other"
            )
        if number is not None:
            seen.add(number)
        numbers.append(numbers[-1] + 1 if numbers else 0)
    return numbers


def ranking_dataset(pairs: Pairs) -> Dataset:
    """One row for each ranking: its different ``texts``; ``chosen`` and ``rejected`` index them for each of its pairs.

    So a ranking is never split over two batches, and each of its K responses goes through the model once, not K - 1
    times (Ouyang et al. 2022, section 3.5).
    """
    rows = [
        _ranking(pairs, list(members)) for _, members in groupby(range(len(pairs.ranking)), pairs.ranking.__getitem__)
    ]
    return Dataset.from_list(rows)


def _ranking(pairs: Pairs, members: list[int]) -> dict[str, Any]:
    places: dict[tuple[int, ...], int] = {}
    chosen, rejected = (
        [places.setdefault(tuple(side[row]), len(places)) for row in members] for side in (pairs.chosen, pairs.rejected)
    )
    return {
        "texts": [list(text) for text in places],
        "chosen": chosen,
        "rejected": rejected,
        "margin": [pairs.margin[row] for row in members],
        "length": max(map(len, places)),
    }


def rating_dataset(ratings: Ratings, mean: float, std: float) -> Dataset:
    """One row for each text: ``texts`` (just it), ``score``, standardised with the given mean and deviation."""
    scores = [(score - mean) / std for score in ratings.score]
    return Dataset.from_dict(
        {"texts": [[text] for text in ratings.texts], "score": scores, "length": [len(text) for text in ratings.texts]}
    )


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
