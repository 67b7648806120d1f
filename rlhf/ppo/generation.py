"""Sampling responses from a policy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.ppo.policy import CausalPolicy

DROP_FINISHED_AT = 0.25  # of the rows: dropping copies the cache, so it must be worth it


class Generated(NamedTuple):
    """Responses (B, T) with their lengths (B,), the end-of-sequence token included where ``ended`` (B,).

    ``logprobs`` and ``entropies`` (B, T) are those of the tempered distribution that each token was drawn from, in
    nats. What is beyond a length has no meaning.
    """

    responses: Tensor
    lengths: Tensor
    ended: Tensor
    logprobs: Tensor
    entropies: Tensor


@torch.no_grad()
def generate(
    policy: CausalPolicy,
    prompts: Tensor,
    prompt_lengths: Tensor,
    uniforms: Tensor,
    temperature: float,
    eos_token_id: int,
) -> Generated:
    """Sample from softmax(logits / temperature) until end-of-sequence or the limit, all rows at once.

    Args:
        prompts: (B, P), padded on the right to ``prompt_lengths`` (B,).
        uniforms: (B, limit), numbers in [0, 1) that decide every draw: row b's response depends on row b's numbers
            only, whatever the other rows do, and a response has at most ``limit`` tokens.
    """
    count, limit = uniforms.shape
    device = prompts.device
    responses = torch.zeros(count, limit, dtype=torch.long, device=device)
    logprobs, entropies = torch.zeros(count, limit, device=device), torch.zeros(count, limit, device=device)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)

    rows = torch.arange(count, device=device)  # of the result, that the decoder still works on
    decoder = policy.decoder(prompts, prompt_lengths)
    logits = decoder.start()
    for t in range(limit):
        drawn = sample(logits / temperature, uniforms[rows, t])
        responses[rows, t], logprobs[rows, t], entropies[rows, t] = drawn
        lengths[rows] += ~ended[rows]
        ended[rows] |= drawn.tokens == eos_token_id
        going = ~ended[rows]
        share = going.float().mean().item()
        if share == 0.0 or t + 1 == limit:
            break
        tokens = drawn.tokens
        if 1.0 - share >= DROP_FINISHED_AT:
            decoder.keep(going.nonzero()[:, 0])
            rows, tokens = rows[going], tokens[going]
        logits = decoder.step(tokens)
    width = int(lengths.max())
    return Generated(responses[:, :width], lengths, ended, logprobs[:, :width], entropies[:, :width])


class Drawn(NamedTuple):
    """One token a row, its log-probability and the entropy of its distribution, each (B,)."""

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor


def sample(logits: Tensor, uniforms: Tensor) -> Drawn:
    """Draw from softmax(logits), (B, V), by inverting its distribution function at ``uniforms`` (B,) in [0, 1)."""
    logprobs = logits.float().log_softmax(-1)
    probabilities = logprobs.exp()
    cumulative = probabilities.cumsum(-1)
    # A little below 1: u = 1 - 2^-24 times the total could round to the total, beyond the last possible token.
    threshold = uniforms[:, None] * (1.0 - 2.0**-23) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True)
    entropies = -(probabilities * logprobs.clamp_min(torch.finfo(torch.float32).min)).sum(-1)  # 0 log 0 is 0
    return Drawn(tokens[:, 0], logprobs.gather(1, tokens)[:, 0], entropies)
