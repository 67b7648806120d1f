"""Sampling responses from a policy.

Every draw inverts a distribution function at a uniform number that the caller gives, in each back end alike: a
row's response is a function of this row's numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from rlhf.config.ppo_options import Generation
from rlhf.ppo.decoding import DropsRows, make_decoder, pad_left
from rlhf.ppo.policy import Policy
from rlhf.ppo.sequences import prefix_mask

GREEDY = 1e-6  # temperature of greedy decoding: every token but the likeliest has probability 0 in float32
DROP_FINISHED_AT = 0.25  # of the rows: dropping copies the cache, so it must be worth it
STEPS_BETWEEN_LOOKS = 16  # at whether all rows have ended, where a look would make the GPU wait


class Generated(NamedTuple):
    """Responses (B, T) with their lengths (B,), the end-of-sequence token included where ``ended`` (B,).

    ``logprobs`` and ``entropies`` (B, T) are those of the tempered distribution that each token was drawn from, in
    nats. ``values`` (B, T) come from the policy's value head, if it has one that this back end could ask. What is
    beyond a length has no meaning.
    """

    responses: Tensor
    lengths: Tensor
    ended: Tensor
    logprobs: Tensor
    entropies: Tensor
    values: Tensor | None


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Tensor,
    prompt_lengths: Tensor,
    uniforms: Tensor,
    temperature: float,
    eos_token_id: int,
    backend: Generation = "auto",
    rows_at_once: int | None = None,
) -> Generated:
    """Sample from softmax(logits / temperature) until end-of-sequence or the limit.

    Args:
        prompts: (B, P), padded on the right to ``prompt_lengths`` (B,).
        uniforms: (B, limit), numbers in [0, 1) that decide every draw: row b's response depends on row b's numbers
            only, whatever the other rows do, and a response has at most ``limit`` tokens.
        rows_at_once: None is all of them.
    """
    made = []
    for start in range(0, len(prompts), rows_at_once or len(prompts)):
        rows = slice(start, start + (rows_at_once or len(prompts)))
        drawing = _Drawing(uniforms[rows], temperature, eos_token_id)
        if backend == "transformers":
            _with_transformers(policy.language_model, prompts[rows], prompt_lengths[rows], drawing)
        else:
            _with_decoder(policy, prompts[rows], prompt_lengths[rows], drawing, backend)
        made.append(drawing)
    return _joined(made)


class _Drawing:
    """The tables (B, limit) of a batch's responses while they are drawn, column by column."""

    def __init__(self, uniforms: Tensor, temperature: float, eos_token_id: int) -> None:
        count, self.limit = uniforms.shape
        device = uniforms.device
        self.uniforms, self.temperature, self.eos_token_id = uniforms, temperature, eos_token_id
        self.tokens = torch.full(uniforms.shape, eos_token_id, device=device)
        self.logprobs, self.entropies = torch.zeros_like(uniforms), torch.zeros_like(uniforms)
        self.values: Tensor | None = None
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)
        self.at = 0  # the column that is drawn next

    def draw(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The next tokens of some rows, from their tempered logits (rows, V)."""
        t = self.at
        drawn = sample(logits, self.uniforms[rows, t])
        self.tokens[rows, t], self.logprobs[rows, t], self.entropies[rows, t] = drawn
        self.lengths[rows] += ~self.ended[rows]
        self.ended[rows] |= drawn.tokens == self.eos_token_id
        self.at += 1
        return drawn.tokens

    def note_values(self, values: Tensor | None, rows: Tensor) -> None:
        """Keep the values before the tokens that are drawn next."""
        if values is not None:
            self.values = torch.zeros_like(self.uniforms) if self.values is None else self.values
            self.values[rows, self.at] = values


def _joined(made: Sequence[_Drawing]) -> Generated:
    """The tables of all batches, as wide as the longest response."""
    lengths = torch.cat([one.lengths for one in made])
    width = int(lengths.max())

    def table(name: str) -> Tensor:
        return torch.cat([getattr(one, name)[:, :width] for one in made])

    values = None if made[0].values is None else table("values")
    ended = torch.cat([one.ended for one in made])
    return Generated(table("tokens"), lengths, ended, table("logprobs"), table("entropies"), values)


def _with_decoder(
    policy: Policy, prompts: Tensor, prompt_lengths: Tensor, drawing: _Drawing, backend: Generation
) -> None:
    """Decode with a cache of our own; finished rows are dropped where that saves time."""
    decoder = make_decoder(
        policy.language_model, prompts, prompt_lengths, drawing.limit, backend, policy.static_decoders
    )
    rows = torch.arange(len(prompts), device=prompts.device)  # that the decoder still works on
    shrinking = decoder if isinstance(decoder, DropsRows) else None
    hidden = decoder.start()
    while True:
        drawing.note_values(policy.values(hidden), rows)
        tokens = drawing.draw(policy.logits(hidden, drawing.temperature), rows)
        if drawing.at == drawing.limit:
            return
        if shrinking or drawing.at % STEPS_BETWEEN_LOOKS == 0:
            going = ~drawing.ended[rows]
            share = going.float().mean().item()
            if share == 0.0:
                return
            if shrinking and 1.0 - share >= DROP_FINISHED_AT:
                shrinking.keep(going.nonzero()[:, 0])
                rows, tokens = rows[going], tokens[going]
        hidden = decoder.step(tokens)


def _with_transformers(model: PreTrainedModel, prompts: Tensor, prompt_lengths: Tensor, drawing: _Drawing) -> None:
    """Decode with the model's own ``generate``, which works for every architecture; the draws are still ours."""
    if model.config.is_encoder_decoder:
        mask = prefix_mask(prompt_lengths, prompts.shape[1])
        ids = prompts.masked_fill(~mask, 0)
    else:
        ids, mask = pad_left(prompts, prompt_lengths)
    with _plain_settings(model):
        model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            do_sample=False,
            max_new_tokens=drawing.limit,
            eos_token_id=drawing.eos_token_id,
            pad_token_id=drawing.eos_token_id,
            decoder_start_token_id=model.config.decoder_start_token_id if model.config.is_encoder_decoder else None,
            logits_processor=LogitsProcessorList([_Draws(drawing)]),
        )


class _Draws(LogitsProcessor):  # type: ignore[misc]
    """Draws each token itself, and leaves ``generate`` nothing else to choose."""

    def __init__(self, drawing: _Drawing) -> None:
        self.drawing = drawing

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(len(scores), device=scores.device)
        tokens = self.drawing.draw(scores.float() / self.drawing.temperature, rows)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


@contextmanager
def _plain_settings(model: PreTrainedModel) -> Iterator[None]:
    """Within it, the model's own generation settings (top-k, penalties, forced tokens) do not count."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class Drawn(NamedTuple):
    """One token a row, its log-probability and the entropy of its distribution, each (B,)."""

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor


def sample(logits: Tensor, uniforms: Tensor) -> Drawn:
    """Draw from softmax(logits), (B, V), by inverting its distribution function at ``uniforms`` (B,) in [0, 1).

    Logits that are NaN give a NaN log-probability, and some token.
    """
    logprobs = logits.float().log_softmax(-1)
    probabilities = logprobs.exp()
    cumulative = probabilities.cumsum(-1)
    # A little below 1: u = 1 - 2^-24 times the total could round to the total, beyond the last possible token.
    threshold = uniforms[:, None] * (1.0 - 2.0**-23) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp_max(logits.shape[-1] - 1)
    entropies = -(probabilities * logprobs.clamp_min(torch.finfo(torch.float32).min)).sum(-1)  # 0 log 0 is 0
    return Drawn(tokens[:, 0], logprobs.gather(1, tokens)[:, 0], entropies)
