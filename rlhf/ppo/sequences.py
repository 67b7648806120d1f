"""Prompts with their responses, and the two ways of laying out one number per response token.

Shapes: B rows, P tokens of the longest prompt, T of the longest response, L of the longest row, N response tokens of
all rows together. Packed (N,) numbers are those of the real response tokens, row after row; ``unpack`` puts them
into (B, T).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Prompts with their responses, each padded on the right; what is beyond a length is never looked at.

    ``prompts`` (B, P) and ``responses`` (B, T) hold token ids, the lengths (B,) count real tokens, at least one each.
    """

    prompts: Tensor
    prompt_lengths: Tensor
    responses: Tensor
    response_lengths: Tensor

    @property
    def prompt_mask(self) -> Tensor:
        """(B, P), True for real prompt tokens."""
        return prefix_mask(self.prompt_lengths, self.prompts.shape[1])

    @property
    def mask(self) -> Tensor:
        """(B, T), True for real response tokens."""
        return prefix_mask(self.response_lengths, self.responses.shape[1])

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of prompt and response together."""
        return self.prompt_lengths + self.response_lengths

    def select(self, rows: Tensor) -> Sequences:
        """Some of the rows, with the columns that these need."""
        prompt_lengths, response_lengths = self.prompt_lengths[rows], self.response_lengths[rows]
        return Sequences(
            self.prompts[rows, : int(prompt_lengths.max())],
            prompt_lengths,
            self.responses[rows, : int(response_lengths.max())],
            response_lengths,
        )

    def joined(self) -> tuple[Tensor, Tensor]:
        """Rows of prompt and response (B, L), filled up with id 0; and the flat places (N,) that predict responses."""
        start, end = self.prompt_lengths[:, None], self.lengths[:, None]
        column = torch.arange(int(self.lengths.max()), device=start.device)
        ids = self.prompts.new_zeros(len(start), len(column))
        ids[column < start] = self.prompts[self.prompt_mask]
        ids[(column >= start) & (column < end)] = self.responses[self.mask]
        predicts = (column >= start - 1) & (column < end - 1)
        return ids, predicts.flatten().nonzero()[:, 0]


def prefix_mask(lengths: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width), True in the first ``lengths[b]`` columns of row b."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def unpack(packed: Tensor, mask: Tensor) -> Tensor:
    """Packed (N,) -> (B, T): the numbers at the True positions of ``mask``, 0 elsewhere. Differentiable."""
    return packed.new_zeros(mask.shape).masked_scatter(mask, packed)
