"""Models made from random weights: the architectures of ``model.init: random``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.config import Model


def random_model(model: Model, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A causal model with random weights of the size in ``model``, for the vocabulary of ``tokenizer``.

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
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return made


def _gpt2(model: Model, shared: Mapping[str, Any]) -> PreTrainedConfig:
    return GPT2Config(
        n_layer=model.layers,
        n_embd=model.width,
        n_head=model.heads,
        n_positions=model.context,
        activation_function="gelu_pytorch_tanh",  # `gelu_new` in one kernel instead of eight
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
        **shared,
    )


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


_ARCHITECTURES: dict[str, Callable[[Model, Mapping[str, Any]], PreTrainedConfig]] = {
    "gpt2": _gpt2,
    "llama": _llama,
}
