"""Policies and value models: behind these hide causal models and encoder-decoders, full weights and LoRA adapters.

The trainer deals in ``Sequences`` and packed results, one number per real response token, (N,). Shapes: B rows, P
tokens of the longest prompt, T of the longest response, V vocabulary, d hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf.ppo import core
from rlhf.ppo.decoding import Kept
from rlhf.ppo.sequences import Sequences

if TYPE_CHECKING:
    from peft import PeftModel

LOGITS_AT_ONCE = 2**26  # elements; 256 MB in float32


class TokenStatistics(NamedTuple):
    """Packed (N,): log-probabilities of the response tokens; entropies of their distributions, where asked for; the
    value before each token, where the policy has a value head."""

    logprobs: Tensor
    entropies: Tensor | None
    values: Tensor | None


class Policy(nn.Module):
    """A language model that writes responses: causal or encoder-decoder, with or without LoRA adapters.

    With a ``value_head``, a layer from d to 1, it is its own value model.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, value_head: nn.Linear | None = None) -> None:
        super().__init__()
        self.model = model
        self.value_head = value_head
        self.static_decoders: Kept = {}

    @property
    def language_model(self) -> PreTrainedModel:
        """The language model itself; its layers contain the adapters, if there are any."""
        return plain(self.model)

    @property
    def in_float32(self) -> bool:
        """Whether all weights are. If not, what is computed of a row differs with the shape of its batch."""
        return all(parameter.dtype == torch.float32 for parameter in self.parameters())

    def forward(self, sequences: Sequences, temperature: float, with_entropy: bool = False) -> TokenStatistics:
        """Log-probabilities of the response tokens at a sampling temperature. Logits are made at their places only."""
        hidden = self.hidden(sequences)
        tokens = sequences.responses[sequences.mask]

        def statistics(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
            logits = self.logits(hidden, temperature)
            logprobs = core.token_logprobs(logits, tokens)
            return (logprobs, core.entropy(logits)) if with_entropy else (logprobs,)

        parts = _in_chunks(statistics, hidden, tokens, self.language_model.config.vocab_size)
        return TokenStatistics(parts[0], parts[1] if with_entropy else None, self.values(hidden))

    def hidden(self, sequences: Sequences) -> Tensor:
        """Hidden states (N, d) from which the response tokens are predicted."""
        return response_hidden(self.language_model, sequences)

    def logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """Hidden states (N, d) -> logits / temperature (N, V) in float32."""
        model, config = self.language_model, self.language_model.config
        head = model.get_output_embeddings()
        if getattr(config, "scale_decoder_outputs", False):  # T5
            hidden = hidden * config.d_model**-0.5
        bias, cap = getattr(model, "final_logits_bias", None), getattr(config, "final_logit_softcapping", None)
        if bias is None and cap is None and head.bias is None and temperature > 0.1:  # fp16 takes no number over 65504
            tempered: Tensor = head(hidden / temperature).float()  # d numbers a row to divide, in place of V
            return tempered
        logits: Tensor = head(hidden).float()
        if bias is not None:  # BART
            logits = logits + bias
        if cap is not None:  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits / temperature

    def values(self, hidden: Tensor) -> Tensor | None:
        """Hidden states (N, d) -> values (N,) in float32; None without a value head."""
        return None if self.value_head is None else read(self.value_head, hidden)

    def as_reference(self) -> Policy:
        """A frozen policy that stays as this one is now. With LoRA it shares all weights and has its adapters off."""
        if isinstance(self.model, PreTrainedModel):
            return Policy(copy.deepcopy(self.model).requires_grad_(False).eval())
        return WithoutAdapter(self.model)


class WithoutAdapter(Policy):
    """A LoRA policy with its adapters off: the model that they started from, without a second copy in memory."""

    def hidden(self, sequences: Sequences) -> Tensor:
        """Hidden states (N, d) of the model under the adapters. The output layer has no adapter."""
        with self._off():
            return super().hidden(sequences)

    def _off(self) -> AbstractContextManager[None]:
        return nullcontext() if isinstance(self.model, PreTrainedModel) else self.model.disable_adapter()


class ValueModel(nn.Module):
    """The expected score of the rest of a response, read like a reward model at every position.

    Args:
        model: a classifier whose layer ``score`` reads single tokens; or, with a ``head``, any model with hidden states
            (for an encoder-decoder those of its decoder).
        head: a layer from d to 1.

    The output is (logit - score_mean) / score_std with the numbers in the model's configuration (0 and 1 where
    there are none), so that one which starts from a reward model starts on the scale of its scores.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, head: nn.Linear | None = None) -> None:
        super().__init__()
        self.model = model
        self.head = head

    @classmethod
    def like(cls, policy: Policy) -> ValueModel:
        """One of the policy's architecture, with a copy of its weights and a new head: it predicts 0 everywhere.

        Make it before the policy gets LoRA adapters.
        """
        model = copy.deepcopy(policy.language_model)
        inputs = {id(p) for p in model.get_input_embeddings().parameters()}
        for parameter in model.get_output_embeddings().parameters():
            parameter.requires_grad_(id(parameter) in inputs)  # a value needs no output layer
        return cls(model.base_model, zero_head(model))

    def forward(self, sequences: Sequences) -> Tensor:
        """V(s_t), packed (N,): the value before each response token."""
        model = plain(self.model)
        head = model.score if self.head is None else self.head
        values = read(head, response_hidden(model, sequences))
        return (values - getattr(model.config, "score_mean", 0.0)) / getattr(model.config, "score_std", 1.0)


def read(head: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden states (N, d) -> one number each (N,), in float32 under autocast too: bf16 has three digits."""
    with torch.autocast(hidden.device.type, enabled=False):
        numbers: Tensor = head(hidden.float())
    return numbers.squeeze(-1)


def zero_head(model: PreTrainedModel) -> nn.Linear:
    """A new value head for a model: a layer from its hidden size to 1 that gives 0."""
    head = nn.Linear(model.config.hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head.to(model.device)


def plain(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model itself; its layers contain the adapters, if there are any."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def response_hidden(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """Hidden states (N, d) that predict the response tokens: those of the token before each of them.

    A causal model reads prompt and response as one row, padded on the right where causal attention does not look: it
    needs no mask, positions count from 0, and the amount of padding cannot change a bit. An encoder-decoder has the
    prompt in its encoder, and the response, shifted by one, in its decoder.
    """
    if model.config.is_encoder_decoder:
        seen = sequences.prompt_mask
        encoded = model.get_encoder()(input_ids=_filled(sequences.prompts, seen), attention_mask=seen)
        decoded: Tensor = model.get_decoder()(
            input_ids=shifted(model, sequences),
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=seen,
            use_cache=False,
        ).last_hidden_state
        return decoded[sequences.mask]
    ids, places = sequences.joined()
    seen = torch.ones_like(ids, dtype=torch.bool)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    hidden: Tensor = model.base_model(
        input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=False
    ).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, places)


@torch.no_grad()
def exact_kl(policy: Policy, reference: Policy, temperature: float, sequences: Sequences) -> Tensor:
    """KL(policy || reference) in nats at each response token, packed (N,): exact over the vocabulary.

    sum_v p(v) (log p(v) - log q(v)), p and q the two policies' tempered next-token distributions after the same
    beginning. The sum over a sampled response estimates the KL of the two distributions over responses without bias,
    as does the sum of log p - log q of the sampled tokens, but with far less variance and never below 0.
    """
    ours = policy.hidden(sequences)
    theirs = ours if policy is reference else reference.hidden(sequences)
    size = max(1, LOGITS_AT_ONCE // policy.language_model.config.vocab_size // 4)
    parts = []
    for p, q in zip(torch.split(ours, size), torch.split(theirs, size), strict=True):
        log_p = policy.logits(p, temperature).log_softmax(-1)
        log_q = reference.logits(q, temperature).log_softmax(-1)
        parts.append(F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).clamp_min(0.0))
    return torch.cat(parts)


def _filled(ids: Tensor, mask: Tensor) -> Tensor:
    """Token ids with 0 where the mask is False: there may be anything, and an embedding looks up all of it."""
    return ids.masked_fill(~mask, 0)


def shifted(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """What a decoder reads, (B, T): its start token, then the response without its last token."""
    responses = _filled(sequences.responses, sequences.mask)
    start = torch.full_like(responses[:, :1], model.config.decoder_start_token_id)
    return torch.cat([start, responses[:, :-1]], dim=1)


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
