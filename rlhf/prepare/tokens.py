"""Tokenizers in ``prepare``: one trained on the user's texts, and the lengths of texts in tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf.models.loading import load_config, prompt_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.config.model import Model

END = "<|endoftext|>"  # begins, ends and pads the texts of a tokenizer that is trained here
BATCH = 4096  # texts tokenized at once
ENDLESS = re.compile(r"\S{256}|\s{256}")


class Limit(NamedTuple):
    """The longest sequence that a model takes, in tokens; ``halves``: a prompt and a response may be as long each."""

    tokens: int
    halves: bool = False


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; the same texts, in any order, give the same one.

    No text is unknown to it, as each of the 256 bytes is a token (Radford et al. 2019, section 2.2). It has
    fewer than ``vocab_size`` tokens only where the texts have no more: once every word is one token.

    Args:
        texts: what the merges are learned from.
        vocab_size: most tokens, the 256 bytes and one special token included.
        context: longest sequence of the model, in tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain.from_iterable(map(_pieces, texts)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _pieces(text: str) -> Iterator[str]:
    """The text, cut within words (or spaces) that never end: training on a megabyte of it would hardly end."""
    start = 0
    for found in ENDLESS.finditer(text):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def context_length(model: Model) -> Limit | None:
    """The longest sequence that a model takes; ``None`` where its configuration knows no limit.

    Raises:
        ModelError: its configuration cannot be loaded.
    """
    if model.path is None:
        return Limit(model.context, halves=model.architecture == "t5")
    config = load_config(model.path, model.revision, model.trust_remote_code)
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else Limit(limit, halves=bool(config.is_encoder_decoder))


class Lengths:
    """Lengths of texts in tokens. No text is tokenized twice. ``encoder``: one reads the prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: bool = False) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}
        self._prompt_extra = len(prompt_token_ids(tokenizer, ["a"], encoder)[0]) - len(self._ids(["a"])[0])

    def of_prompts(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of each text as a prompt: with the special tokens that it gets as one. (N,)"""
        return self._of(texts) + self._prompt_extra

    def of_responses(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of each text as a response: with the end-of-sequence token. (N,)"""
        return self._of(texts) + 1

    def _of(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        new = iter(dict.fromkeys(text for text in texts if text not in self._known))
        while batch := list(islice(new, BATCH)):
            self._known.update(zip(batch, self._sizes(batch), strict=True))
        return np.array([self._known[text] for text in texts], dtype=np.int64)

    def _sizes(self, texts: list[str]) -> list[int]:
        if self._tokenizer.is_fast:  # what wraps its back end would also make lists of all that it knows
            encodings = self._tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [len(encoding) for encoding in encodings]
        return [len(ids) for ids in self._ids(texts)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def statistics(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, float]:
    """Minimum, mean, median, 95th percentile and maximum of lengths (N,), in tokens; empty for N = 0."""
    if not len(lengths):
        return {}
    p50, p95 = np.percentile(lengths, (50, 95))
    return {
        "min": int(lengths.min()),
        "mean": float(lengths.mean()),
        "p50": float(p50),
        "p95": float(p95),
        "max": int(lengths.max()),
    }
