"""The trained reward model: which tokens it reads of a text, and the score that it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import RewardError
from rlhf.models.score_input import score_token_ids, usable_length
from rlhf.rewards.functions import describe_row


@dataclass(frozen=True)
class RewardModel:
    """A trained classifier with one output as a scorer, with its own tokenizer.

    It scores the text prompt + response with its end token, tokenized as in its training (``score_token_ids``). A
    causal classifier reads the last real token (a length says which, so that padding may be end-of-sequence too); an
    encoder and T5 read what they read in training. The score is (logit - score_mean) / score_std with the numbers of
    the model's configuration, 0 and 1 where there are none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens_at_once: int = 16384  # of a forward pass, padding included

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float]:
        """Scores of the responses; ``columns`` are not used.

        Raises:
            RewardError: a text is longer than the model's context.
        """
        rows = self._token_ids(prompts, responses)
        scores = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        while order:
            size = max(1, self.tokens_at_once // len(rows[order[0]]))
            batch, order = order[:size], order[size:]
            for row, score in zip(batch, self._scores([rows[row] for row in batch]).tolist(), strict=True):
                scores[row] = score
        return scores

    def _token_ids(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        ids, limit = score_token_ids(self.tokenizer, texts), usable_length(self.model)
        for row, tokens in enumerate(ids):
            if limit is not None and len(tokens) > limit:
                raise RewardError(
                    f"the reward model reads at most {limit} tokens, but prompt and response have {len(tokens)} in "
                    f"{describe_row(row, prompts, responses)}; lower ppo.max_new_tokens or data.max_prompt_tokens"
                )
        return ids

    @torch.no_grad()
    def _scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Normalised scores (B,) of rows of token ids."""
        device = self.model.device
        lengths = torch.tensor([len(row) for row in rows])
        padding = getattr(self.model.config, "pad_token_id", None)  # RoBERTa counts positions by it
        padding = self.tokenizer.pad_token_id if padding is None else padding
        ids = torch.full((len(rows), int(lengths.max())), int(padding or 0))
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        logits = self._logits(ids.to(device), mask.to(device), lengths.to(device))
        config = self.model.config
        return (logits.float() - getattr(config, "score_mean", 0.0)) / getattr(config, "score_std", 1.0)

    def _logits(self, ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        head = getattr(self.model, "score", None)
        if not isinstance(head, nn.Linear):  # an encoder: it knows itself what it reads
            pooled: Tensor = self.model(input_ids=ids, attention_mask=mask).logits[:, 0]
            return pooled
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
        with torch.autocast(last.device.type, enabled=False):  # a score in bf16 has three digits
            scores: Tensor = head(last.float())
        return scores[:, 0]
