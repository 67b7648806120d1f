"""The one interface behind which the kinds of models hide: causal or not, full weights or LoRA adapters.

The trainer deals in ``Sequences`` and packed results: one number per real response token, ``(N,)``, row after row,
N the sum of ``response_lengths``. ``unpack`` puts them back into (B, T). An encoder-decoder would be two more classes
here, a policy whose ``forward`` gives the prompt to the encoder and a decoder that keeps the encoder's output.

Shapes: B rows, P tokens of the longest prompt, T of the longest response, L of the longest row, V vocabulary,
d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from rlhf.errors import ModelError
from rlhf.ppo import core

if TYPE_CHECKING:
    from peft import PeftModel

LOGITS_AT_ONCE = 2**26  # elements; 256 MB in float32


class Sequences(NamedTuple):
    """Prompts with their responses, each padded on the right; what is beyond a length is never looked at.

    ``prompts`` (B, P) and ``responses`` (B, T) hold token ids, the lengths (B,) count real tokens, at least one each.
    """

    prompts: Tensor
    prompt_lengths: Tensor
    responses: Tensor
    response_lengths: Tensor

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


class TokenStatistics(NamedTuple):
    """Packed (N,): log-probabilities of the response tokens; entropies of their distributions, where asked for."""

    logprobs: Tensor
    entropies: Tensor | None


class Decoder(Protocol):
    """Next-token logits of a batch of growing sequences, in float32."""

    def start(self) -> Tensor:
        """Logits (B, V) of the first response token."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append ``tokens`` (B,) and return the logits (B, V) of the next ones."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only; B becomes their number."""


def prefix_mask(lengths: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width), True in the first ``lengths[b]`` columns of row b."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def unpack(packed: Tensor, mask: Tensor) -> Tensor:
    """Packed (N,) -> (B, T): the numbers at the True positions of ``mask``, 0 elsewhere. Differentiable."""
    return packed.new_zeros(mask.shape).masked_scatter(mask, packed)


class CausalPolicy(nn.Module):
    """A causal language model, with or without LoRA adapters.

    Rows are padded on the right, where causal attention cannot look, so that a forward needs no mask, positions
    count from 0, and the amount of padding cannot change a result.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    @property
    def causal(self) -> PreTrainedModel:
        """The language model itself; its layers contain the adapters, if there are any."""
        model = self.model
        return model if isinstance(model, PreTrainedModel) else model.get_base_model()

    def without_adapter(self) -> AbstractContextManager[None]:
        """Within it, a LoRA policy is the model that its adapters started from."""
        return nullcontext() if isinstance(self.model, PreTrainedModel) else self.model.disable_adapter()

    def forward(self, sequences: Sequences, temperature: float, with_entropy: bool = False) -> TokenStatistics:
        """Log-probabilities of the response tokens at a sampling temperature. Logits are made at their places only."""
        hidden = response_hidden(self.causal.base_model, sequences)
        tokens = sequences.responses[sequences.mask]

        def statistics(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
            logits = self.logits(hidden) / temperature
            logprobs = core.token_logprobs(logits, tokens)
            return (logprobs, core.entropy(logits)) if with_entropy else (logprobs,)

        parts = _in_chunks(statistics, hidden, tokens, self.causal.config.vocab_size)
        return TokenStatistics(parts[0], parts[1] if with_entropy else None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (N, d) -> logits (N, V) in float32, before any temperature."""
        logits: Tensor = self.causal.get_output_embeddings()(hidden).float()
        cap = getattr(self.causal.config, "final_logit_softcapping", None)  # Gemma 2
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def decoder(self, prompts: Tensor, prompt_lengths: Tensor) -> Decoder:
        """Start to generate from prompts (B, P), padded on the right, with these lengths (B,)."""
        return CausalDecoder(self, prompts, prompt_lengths)

    @torch.no_grad()
    def check(self) -> None:
        """See that trunk, head and right padding give this model's own logits.

        Raises:
            ModelError: they do not, e.g. since the architecture scales its logits.
        """
        device, size = self.causal.device, min(self.causal.config.vocab_size, 97)
        ids = torch.arange(1, 9, device=device)[None] % size
        four = torch.tensor([4], device=device)
        sequences = Sequences(ids[:, :4], four, ids[:, 4:], four)
        own = self.causal(input_ids=ids).logits[0, 3:-1].float().log_softmax(-1)
        expected = own.gather(1, ids[0, 4:, None])[:, 0]
        if not torch.allclose(self(sequences, 1.0).logprobs, expected, rtol=1e-3, atol=1e-3):
            raise ModelError(
                f"PPO does not know how a {self.causal.config.model_type} model makes its logits from hidden states; "
                "take another model.path, or extend CausalPolicy.logits"
            )


class ValueModel(nn.Module):
    """The expected score of the rest of a response, read like a reward model at every position.

    The output is (logit - score_mean) / score_std with the numbers in the model's configuration (0 and 1 where
    there are none), so that one which starts from a reward model starts on the scale of its scores.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    @property
    def classifier(self) -> PreTrainedModel:
        """The classifier itself; its layers contain the adapters, if there are any."""
        model = self.model
        return model if isinstance(model, PreTrainedModel) else model.get_base_model()

    def forward(self, sequences: Sequences) -> Tensor:
        """V(s_t), packed (N,): the value before each response token, from the hidden state of the token before it."""
        hidden = response_hidden(self.classifier.base_model, sequences)
        values: Tensor = self.classifier.score(hidden).squeeze(-1).float()
        config = self.classifier.config
        return (values - getattr(config, "score_mean", 0.0)) / getattr(config, "score_std", 1.0)


class CausalDecoder:
    """Generation with a key-value cache. Prompts are padded on the left, so that all rows grow at the same column."""

    def __init__(self, policy: CausalPolicy, prompts: Tensor, prompt_lengths: Tensor) -> None:
        width = int(prompt_lengths.max())
        self._policy = policy
        self._mask = prefix_mask(prompt_lengths, width).flip(1)
        self._ids = prompts.new_zeros(self._mask.shape).masked_scatter(
            self._mask, prompts[prefix_mask(prompt_lengths, prompts.shape[1])]
        )
        self._positions = (self._mask.cumsum(1) - 1).clamp_min(0)
        self._cache = DynamicCache(config=policy.causal.config)

    def start(self) -> Tensor:
        return self._forward(self._ids)

    def step(self, tokens: Tensor) -> Tensor:
        self._mask = F.pad(self._mask, (0, 1), value=True)
        self._positions = self._positions[:, -1:] + 1
        return self._forward(tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        self._mask, self._positions = self._mask[rows], self._positions[rows]
        self._cache.batch_select_indices(rows)

    def _forward(self, ids: Tensor) -> Tensor:
        hidden = self._policy.causal.base_model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return self._policy.logits(hidden[:, -1])


def response_hidden(trunk: nn.Module, sequences: Sequences) -> Tensor:
    """Hidden states (N, d) that predict the response tokens: those of the token before each of them."""
    ids, places = _joined(sequences)
    # All True: a row's padding is after its end, where causal attention does not look.
    seen = torch.ones_like(ids, dtype=torch.bool)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    hidden: Tensor = trunk(
        input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=False
    ).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, places)


def _joined(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Rows of prompt and response (B, L), filled up with id 0; and the flat places (N,) that predict responses."""
    start, end = sequences.prompt_lengths[:, None], sequences.lengths[:, None]
    column = torch.arange(int(sequences.lengths.max()), device=start.device)
    ids = sequences.prompts.new_zeros(len(start), len(column))
    ids[column < start] = sequences.prompts[prefix_mask(sequences.prompt_lengths, sequences.prompts.shape[1])]
    ids[(column >= start) & (column < end)] = sequences.responses[sequences.mask]
    predicts = (column >= start - 1) & (column < end - 1)
    return ids, predicts.flatten().nonzero()[:, 0]


def _in_chunks(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], hidden: Tensor, tokens: Tensor, vocabulary: int
) -> tuple[Tensor, ...]:
    """Apply ``function`` to so many rows at once that the logits stay small; the backward pass makes them again."""
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    if len(tokens) <= rows:
        return function(hidden, tokens)
    parts = [
        checkpoint(function, h, t, use_reentrant=False)
        for h, t in zip(torch.split(hidden, rows), torch.split(tokens, rows), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
