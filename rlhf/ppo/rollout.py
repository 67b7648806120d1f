"""What one update learns from: sampled responses, and what the models and rewards say about them.

Shapes: B episodes of this process, T response tokens of the longest one. Whatever is (B, T) has no meaning where
``sequences.mask`` is False.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config.ppo_options import Generation
from rlhf.ppo import batching
from rlhf.ppo.batching import Prompts
from rlhf.ppo.generation import generate
from rlhf.ppo.policy import Policy
from rlhf.ppo.sequences import Sequences, unpack


class Rollout(NamedTuple):
    """Responses that the policy sampled. ``logprobs`` and ``entropies`` (B, T) are at the sampling temperature.

    ``values`` (B, T) are those of the policy's value head, None without one. ``drawn_logprobs`` (B, T) are those that
    decoding saw; the same as ``logprobs`` but in low precision.
    """

    prompts: Prompts
    responses: list[str]  # texts, without special tokens
    sequences: Sequences
    ended: Tensor  # (B,), whether the response has an end-of-sequence token
    logprobs: Tensor
    entropies: Tensor
    values: Tensor | None
    drawn_logprobs: Tensor


class Scored(NamedTuple):
    """What the rewards, the reference and the value model say about a rollout."""

    raw_scores: Tensor  # (B,), the weighted sum as the rewards gave it
    scores: Tensor  # (B,), after scaling, clipping and the rule for missing end-of-sequence
    components: dict[str, Tensor]  # name -> (B,), each reward before its weight
    ref_logprobs: Tensor  # (B, T)
    values: Tensor  # (B, T)


class Experience(NamedTuple):
    """What the epochs of an update work on. All but ``sequences`` (B, T), from before its first step.

    ``rewards`` are those that the metrics report; if they are whitened, advantages and returns come from whitened ones.
    """

    sequences: Sequences
    logprobs: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, rows: Tensor) -> Experience:
        """Some of the rows, with the columns that these need."""
        sequences = self.sequences.select(rows)
        width = sequences.responses.shape[1]
        return Experience(sequences, *(tensor[rows, :width] for tensor in self[1:]))


def collect(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    uniforms: Tensor,
    temperature: float,
    device: torch.device,
    backend: Generation = "auto",
    rows_at_once: int | None = None,
) -> Rollout:
    """Sample a response to each prompt. ``uniforms`` (B, limit) in [0, 1) decide the draws and the length limit."""
    ids, lengths = batching.pad(prompts.token_ids, device)
    generated = generate(
        policy, ids, lengths, uniforms.to(device), temperature, int(tokenizer.eos_token_id), backend, rows_at_once
    )
    sequences = Sequences(ids, lengths, generated.responses, generated.lengths)
    tokens, counts = generated.responses.tolist(), generated.lengths.tolist()
    texts = tokenizer.batch_decode(
        [row[:count] for row, count in zip(tokens, counts, strict=True)], skip_special_tokens=True
    )
    tables = generated.logprobs, generated.entropies, generated.values
    return Rollout(prompts, texts, sequences, generated.ended, *tables, drawn_logprobs=generated.logprobs)


@torch.no_grad()
def per_token(forward: Callable[[Sequences], Tensor], sequences: Sequences, tokens_at_once: int) -> Tensor:
    """Run a model over a rollout in micro-batches, without gradients.

    ``forward`` gives packed numbers, (N,) or several planes of them, (K, N); the result is (B, T) or (K, B, T).
    """
    result: Tensor | None = None
    for rows in batching.micro_batches(sequences.lengths, tokens_at_once):
        part = sequences.select(rows)
        packed = forward(part).float()
        if result is None:
            result = packed.new_zeros(*packed.shape[:-1], *sequences.responses.shape)
        tables = torch.stack([unpack(plane, part.mask) for plane in packed.reshape(-1, packed.shape[-1])])
        result[..., rows, : part.responses.shape[1]] = tables.reshape(*packed.shape[:-1], *part.mask.shape)
    assert result is not None  # there is at least one row
    return result
