"""Decoding with a cache of keys and values, one step for all rows: the back ends behind ``generation.generate``.

Causal models have two: ``DynamicDecoder`` lets finished rows go, ``StaticDecoder`` works in place
so that a CUDA graph can replay a step. ``CrossDecoder`` is that of encoder-decoders.

Shapes: B rows, P tokens of the longest prompt, d hidden size, L columns of a preallocated cache.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer

from rlhf.config.ppo_options import Generation
from rlhf.ppo.sequences import prefix_mask

log = logging.getLogger(__name__)

COLUMNS = 64  # a preallocated cache is a multiple of this long, so that few shapes need a graph of their own


class Decoder(Protocol):
    """Hidden states of a batch of growing sequences, from which their next tokens are predicted."""

    def start(self) -> Tensor:
        """Read the prompts. Hidden states (B, d) of the first response token."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append ``tokens`` (B,) and return the hidden states (B, d) of the next ones."""


@runtime_checkable
class DropsRows(Protocol):
    """A decoder whose steps get cheaper when rows go."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only; B becomes their number."""


Kept = dict[tuple[int, int], "StaticDecoder"]


def make_decoder(
    model: PreTrainedModel, prompts: Tensor, prompt_lengths: Tensor, limit: int, backend: Generation, kept: Kept
) -> Decoder:
    """A decoder for prompts (B, P), padded on the right to ``prompt_lengths`` (B,), and up to ``limit`` new tokens.

    ``auto`` is ``static`` on CUDA. A model that a preallocated cache does not fit (an encoder-decoder, one with
    attention windows) gets ``dynamic`` instead. ``kept`` holds the model's static decoders by shape, for the next time.
    """
    if model.config.is_encoder_decoder:
        return CrossDecoder(model, prompts, prompt_lengths)
    wants_static = backend == "static" or (backend == "auto" and prompts.device.type == "cuda")
    if not (wants_static and allows_static(model)):
        return DynamicDecoder(model, prompts, prompt_lengths, limit)
    columns = -(-(int(prompt_lengths.max()) + limit) // COLUMNS) * COLUMNS
    shape = len(prompts), columns
    if shape not in kept:
        kept.clear()  # one at a time: a cache is large
        kept[shape] = StaticDecoder(model, *shape)
    kept[shape].load(prompts, prompt_lengths)
    return kept[shape]


def allows_static(model: PreTrainedModel) -> bool:
    """Whether a cache with columns that are still empty can be masked.

    Every layer must attend to all that came before, by positions that it is given, and its attention must read a mask
    of booleans: eager implementations add masks.
    """
    reads_booleans = model.config._attn_implementation == "sdpa"
    return attends_to_all(model) and reads_booleans and not getattr(model.config, "alibi", False)


def attends_to_all(model: PreTrainedModel) -> bool:
    """Whether no layer has an attention window or another state than keys and values."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return kinds == {"full_attention"} and not windowed


class DynamicDecoder:
    """A causal model that lets finished rows go. Prompts are padded on the left: rows grow at the same column."""

    def __init__(self, model: PreTrainedModel, prompts: Tensor, prompt_lengths: Tensor, limit: int) -> None:
        self._model = model
        self._ids, self._mask = pad_left(prompts, prompt_lengths)
        self._positions = positions_of(self._mask)
        self._cache: Cache = DynamicCache(config=model.config)
        if attends_to_all(model):
            most = self._ids.shape[1] + limit
            self._cache = Cache(layers=[_FrontLayer(most) for _ in range(model.config.num_hidden_layers)])

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
        hidden: Tensor = self._model.base_model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return hidden[:, -1]


class CrossDecoder:
    """An encoder-decoder: the encoder reads the prompts once, and its output is used by every step."""

    def __init__(self, model: PreTrainedModel, prompts: Tensor, prompt_lengths: Tensor) -> None:
        self._model = model
        self._seen = prefix_mask(prompt_lengths, prompts.shape[1])
        self._encoded: Tensor = model.get_encoder()(
            input_ids=prompts.masked_fill(~self._seen, 0), attention_mask=self._seen
        ).last_hidden_state
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def start(self) -> Tensor:
        first = self._model.config.decoder_start_token_id
        return self.step(torch.full((len(self._seen),), first, device=self._seen.device))

    def step(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self._model.get_decoder()(
            input_ids=tokens[:, None],
            encoder_hidden_states=self._encoded,
            encoder_attention_mask=self._seen,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return hidden[:, -1]

    def keep(self, rows: Tensor) -> None:
        self._seen, self._encoded = self._seen[rows], self._encoded[rows]
        self._cache.batch_select_indices(rows)


class StaticDecoder:
    """A causal model with a preallocated cache (L columns), every tensor of which stays where it is.

    On CUDA a step is recorded once as a CUDA graph and then replayed: the hundreds of kernels of a small batch's
    step are launched at once. The graph reads the weights where training writes them.
    """

    def __init__(self, model: PreTrainedModel, count: int, columns: int) -> None:
        device = model.device
        self._model = model
        self._cache = Cache(layers=[_StaticLayer(columns) for _ in range(model.config.num_hidden_layers)])
        self._ids = torch.zeros(count, 1, dtype=torch.long, device=device)
        self._positions = torch.zeros_like(self._ids)
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._mask = torch.zeros(count, 1, 1, columns, dtype=torch.bool, device=device)  # what the next token sees
        self._hidden: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._records = device.type == "cuda"  # whether a graph is worth trying

    def load(self, prompts: Tensor, prompt_lengths: Tensor) -> None:
        """Begin with these prompts."""
        self._prompts, self._seen = pad_left(prompts, prompt_lengths)
        width, columns = self._seen.shape[1], self._mask.shape[-1]
        self._cache.reset()
        self._column.fill_(width)
        self._positions.copy_(prompt_lengths[:, None])
        self._mask.copy_(F.pad(self._seen, (0, columns - width))[:, None, None])

    def start(self) -> Tensor:
        width, columns = self._seen.shape[1], self._mask.shape[-1]
        earlier = torch.ones(width, columns, dtype=torch.bool, device=self._mask.device).tril()
        itself = torch.eye(width, columns, dtype=torch.bool, device=self._mask.device)
        # Padding sees itself: a row of nothing but False would be NaN.
        return self._forward(self._prompts, positions_of(self._seen), (self._mask & earlier) | itself)

    def step(self, tokens: Tensor) -> Tensor:
        self._ids.copy_(tokens[:, None])
        if self._graph is None and self._records:
            self._record()
        if self._graph is None:
            return self._in_place()
        self._graph.replay()
        assert self._hidden is not None
        return self._hidden.clone()

    def _in_place(self) -> Tensor:
        """One step from ``_ids``; everything that it changes, it changes where it is."""
        self._mask.index_fill_(3, self._column, True)
        hidden = self._forward(self._ids, self._positions, self._mask)
        self._column.add_(1)
        self._positions.add_(1)
        return hidden

    def _record(self) -> None:
        """Record a step, after running it once so that libraries set themselves up. A recording computes nothing."""
        state = [self._mask, self._column, self._positions, *(layer.cumulative_length for layer in self._cache.layers)]
        before = [tensor.clone() for tensor in state]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")  # what waits for the GPU cannot be recorded: learn it before trying
        try:
            with torch.cuda.stream(side):
                self._in_place()
        except RuntimeError as error:
            log.warning("decoding without CUDA graphs, which is slower: this model waits for the GPU: %s", error)
            self._records = False
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream().wait_stream(side)
            for tensor, was in zip(state, before, strict=True):
                tensor.copy_(was)
        if self._records:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._hidden = self._in_place()

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        with _casting_anew():
            hidden: Tensor = self._model.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state
        return hidden[:, -1]


class _FrontLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values at the front of buffers for ``most`` columns: a step does not copy what came before."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **options: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [x.new_empty(*x.shape[:2], self._most, x.shape[-1]) for x in (key_states, value_states)]
            self._length = 0
        start, self._length = self._length, self._length + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self._length] = states
        return self._front()

    def batch_select_indices(self, indices: Tensor) -> None:
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self._front()

    def _front(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)
        return self.keys, self.values


class _StaticLayer(StaticLayer):  # type: ignore[misc]
    """Keys and values in the precision of the matrix products; under autocast the two may come in different ones."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **options: object
    ) -> tuple[Tensor, Tensor]:
        kind = key_states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else key_states.dtype
        keys, values = super().update(key_states.to(dtype), value_states.to(dtype), *args, **options)
        return keys, values


def pad_left(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows padded on the right -> the same padded on the left with id 0, and the mask of real tokens; both (B, P)."""
    mask = prefix_mask(lengths, int(lengths.max())).flip(1)
    return ids.new_zeros(mask.shape).masked_scatter(mask, ids[prefix_mask(lengths, ids.shape[1])]), mask


def positions_of(mask: Tensor) -> Tensor:
    """(B, P) positions of real tokens, counted from 0; 0 in the padding before them."""
    return (mask.cumsum(1) - 1).clamp_min(0)


@contextmanager
def _casting_anew() -> Iterator[None]:
    """Within it, autocast casts weights each time, as a recorded step must: a cached cast would keep old weights."""
    was = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was)
