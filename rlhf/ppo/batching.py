"""Which prompts an update takes, which random numbers it uses, and how rows are put into forward passes.

All of it is a function of the seed and the update's number. So a resumed run needs no more than that number to draw
what the uninterrupted one would have drawn, whatever had been drawn before the kill.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.models import loading


@dataclass(frozen=True)
class Prompts:
    """The prompts of a training: texts, token ids, and the dataset's other columns for the rewards."""

    texts: Sequence[str]
    token_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **columns: Sequence[Any]) -> Prompts:
        """Prompts for a causal model from their texts; ``columns`` are for the rewards."""
        return cls(texts, loading.prompt_token_ids(tokenizer, texts), columns)

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Sequence[int]) -> Prompts:
        """Some of the rows, in the order given."""
        return Prompts(
            [self.texts[row] for row in rows],
            [self.token_ids[row] for row in rows],
            {name: [values[row] for row in rows] for name, values in self.columns.items()},
        )


def derived_seed(seed: int, *names: object) -> int:
    """A seed of 32 bits (all that torch's CPU generator takes in) for one purpose, unrelated to those of others."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:4], "big")


def generator(seed: int, *names: object) -> torch.Generator:
    """A generator on the CPU, in the state that belongs to a purpose: ``generator(seed, "sample", update)``."""
    return torch.Generator().manual_seed(derived_seed(seed, *names))


def reseed(seed: int, update: int) -> None:
    """Put every global generator (Python's, NumPy's, torch's) into the state that belongs to an update.

    PPO itself does not draw from them; a reward function might.
    """
    random.seed(derived_seed(seed, "python", update))
    np.random.seed(derived_seed(seed, "numpy", update))
    torch.manual_seed(derived_seed(seed, "torch", update))


def prompt_rows(seed: int, update: int, episodes: int, count: int) -> list[int]:
    """The rows, of ``count`` prompts, that an update (from 1) takes: pass after pass, each in an order of its own."""
    rows: list[int] = []
    for place in range((update - 1) * episodes, update * episodes):
        if not rows or place % count == 0:
            order = torch.randperm(count, generator=generator(seed, "prompts", place // count)).tolist()
        rows.append(order[place % count])
    return rows


def pad(rows: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Rows of token ids -> (B, longest) padded on the right with id 0, and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return padded.to(device), lengths.to(device)


def micro_batches(lengths: Tensor, budget: int) -> list[Tensor]:
    """Split rows, given by their lengths (B,) in tokens, into batches of at most ``budget`` tokens with padding.

    Rows go by length, longest first, so that padding is small and a lack of memory shows at once. A row longer
    than the budget is a batch of its own. Returns indices into ``lengths``.
    """
    order = lengths.argsort(descending=True, stable=True)
    ordered = lengths[order].tolist()
    batches: list[Tensor] = []
    start = 0
    while start < len(ordered):
        size = max(1, budget // ordered[start])
        batches.append(order[start : start + size])
        start += size
    return batches
