"""A judge model: it learns from people's labels what to say of other responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rlhf import rewards
from rlhf.judge.judges import Columns
from rlhf.reward import stage as reward
from rlhf.training import computing

if TYPE_CHECKING:
    from rlhf.context import Context


def judge_model(context: Context) -> Callable[[Sequence[str], Sequence[str], Columns], Sequence[float]]:
    """The scores of a model that learns people's labels first, as the reward stage would by section ``judge.model``.

    Raises:
        ModelError, DataError, TrainingError: of the training.
    """
    section = context.config.judge.model
    computing.set_up_cpu(context.config.resources)
    config = context.config.model_copy(update={"reward": section})
    model, tokenizer, *_ = reward.learn(replace(context, config=config))
    model.eval().requires_grad_(False)
    scorer = rewards.RewardModel(model, tokenizer)

    def score(prompts: Sequence[str], responses: Sequence[str], columns: Columns) -> Sequence[float]:
        with torch.no_grad(), computing.autocast(context.config.resources):
            return scorer(prompts, responses, columns)

    return score
