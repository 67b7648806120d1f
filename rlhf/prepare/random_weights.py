"""Models made from random weights: the architectures of ``model.init: random``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    T5Config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.config.model import Model


def random_model(model: Model, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A language model with random weights of the size in ``model``, for the vocabulary of ``tokenizer``.

    The weights come from torch's global generator: seed it first. Dropout is 0, and the output embeddings are
    the input embeddings.
    """
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    config = _ARCHITECTURES[model.architecture](model, shared)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    made: PreTrainedModel = kind.from_config(config, dtype=torch.float32)
    return made


def _gpt2(model: Model, shared: Mapping[str, Any]) -> PreTrainedConfig:
    return GPT2Config(**_gpt(model), summary_first_dropout=0.0, **shared)


def _gpt_bigcode(model: Model, shared: Mapping[str, Any]) -> PreTrainedConfig:
    return GPTBigCodeConfig(**_gpt(model), **shared)


def _gpt(model: Model) -> dict[str, Any]:
    return {
        "n_layer": model.layers,
        "n_embd": model.width,
        "n_head": model.heads,
        "n_positions": model.context,
        "activation_function": "gelu_pytorch_tanh",  # `gelu_new` in one kernel instead of eight
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _llama(model: Model, shared: Mapping[str, Any]) -> PreTrainedConfig:
    return LlamaConfig(
        num_hidden_layers=model.layers,
        hidden_size=model.width,
        intermediate_size=4 * model.width,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        max_position_embeddings=model.context,
        **shared,
    )


def _falcon(model: Model, shared: Mapping[str, Any]) -> PreTrainedConfig:
    return FalconConfig(
        num_hidden_layers=model.layers,
        hidden_size=model.width,
        num_attention_heads=model.heads,
        max_position_embeddings=model.context,
        **shared,
    )


def _t5(model: Model, shared: Mapping[str, Any]) -> PreTrainedConfig:
    """Encoder and decoder with ``layers`` each. Its positions are relative: only ``prepare`` sees to the context."""
    return T5Config(
        num_layers=model.layers,
        d_model=model.width,
        d_kv=model.width // model.heads,
        d_ff=4 * model.width,
        num_heads=model.heads,
        dropout_rate=0.0,
        decoder_start_token_id=shared["pad_token_id"],
        **shared,
    )


_ARCHITECTURES: dict[str, Callable[[Model, Mapping[str, Any]], PreTrainedConfig]] = {
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt_bigcode,
    "llama": _llama,
    "falcon": _falcon,
    "t5": _t5,
}
