"""How a reward model reads a text: the same in its training and wherever it scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def score_token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, with all that the tokenizer adds by itself, and one end-of-sequence token at the end.

    Encoders and T5 add their end themselves (``[SEP]``, ``</s>``); a second one would be a token that the model never
    saw in its pretraining. A text that ends with end-of-sequence already gets no other one either.
    """
    if not texts:
        return []
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    bare = [text.removesuffix(tokenizer.eos_token or "") for text in texts]
    rows: list[list[int]] = tokenizer(bare)["input_ids"]
    return [row if row and row[-1] in ends else [*row, tokenizer.eos_token_id] for row in rows]


def usable_length(model: PreTrainedModel) -> int | None:
    """The longest text that a model reads, in tokens; None where positions are relative and nothing bounds it.

    RoBERTa and its kin number positions from the padding token's id + 1 on, so that of 514 positions 512 serve.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    longest: int | None = getattr(model.config, "max_position_embeddings", None)
    return longest
