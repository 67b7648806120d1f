"""TRL's RewardTrainer, made to train on rankings and on ratings too.

Pairs are rankings of two: a row is a ranking, a batch a number of rankings, and each ranking counts the same.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import RewardConfig, RewardTrainer

from rlhf.errors import TrainingError
from rlhf.models import adapt
from rlhf.reward import losses
from rlhf.reward.rows import Pairs, Ratings, ranking_dataset, rating_dataset
from rlhf.training import processes, supervised

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.config.supervised import Reward
    from rlhf.context import Context

log = logging.getLogger(__name__)


class Trainer(supervised.PipelineTrainer, RewardTrainer):  # type: ignore[misc]
    """TRL's trainer with an order of rows that can be resumed, losses checked, and both objectives."""

    loss_is_scaled_for_ga = True  # compute_loss divides by what the whole batch has

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """As it is: rows are token ids already, and TRL would drop long ones without a word."""
        return dataset

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """The rankings or ratings of a whole batch, over its micro-batches and all processes."""
        rows = torch.stack([batch["rows"] for batch in batch_samples]).sum().to(device)
        return rows if processes.count() == 1 else self.accelerator.gather(rows).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The part of a micro-batch in the loss of its whole batch, in which every ranking or rating counts the same.

        ``inputs`` come from one of the collators below. What TRL's own trainer logs is logged.
        """
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        scores, rows, means = outputs.logits[:, 0].float(), inputs["rows"], {}
        if "score" in inputs:
            loss = losses.squared_error(scores, inputs["score"]) if rows else 0.0 * scores.sum()
        else:
            chosen, rejected, weight = scores[inputs["chosen"]], scores[inputs["rejected"]], inputs["weight"]
            center = self.args.center_rewards_coefficient or 0.0
            loss = losses.bradley_terry(chosen, rejected, inputs["margin"], weight, center)
            means["accuracy"] = (weight * (chosen > rejected)).sum()
            means["margin"] = (weight * (chosen - rejected)).sum()
        for name, value in self._figures(scores.detach(), rows, means).items():
            self._metrics["train"][name].append(value.item())
        if num_items_in_batch is not None:  # gradients and losses are averaged over the processes
            loss = loss * (rows / num_items_in_batch) * processes.count()
        return (loss, outputs) if return_outputs else loss

    def _figures(self, scores: Tensor, rows: Tensor, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is logged of a micro-batch, or of those that all processes compute now.

        Args:
            scores: of the micro-batch; they do not count where it has no rows. (B,)
            rows: its rankings or ratings.
            means: figures that are means over these.
        """
        if processes.count() == 1:
            return {"min_reward": scores.min(), "mean_reward": scores.mean(), "max_reward": scores.max(), **means}
        if rows:
            ours = [rows, rows.new_tensor(len(scores)), scores.sum(), scores.min(), scores.max()]
        else:
            ours = [scores.new_tensor(value) for value in (0.0, 0.0, 0.0, math.inf, -math.inf)]
        ours += [rows * value for value in means.values()]
        every = self.accelerator.gather(torch.stack([value.detach().float() for value in ours])[None])
        rows, texts, total = every[:, :3].sum(0)
        figures = {"min_reward": every[:, 3].min(), "mean_reward": total / texts, "max_reward": every[:, 4].max()}
        return figures | dict(zip(means, every[:, 5:].sum(0) / rows, strict=True))


def make_trainer(
    context: Context, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: Pairs | Ratings
) -> Trainer:
    """A trainer of ``model``, with LoRA adapters if configured, on all rows of ``train``.

    For ratings, ``model.config`` must have their ``rating_mean`` and ``rating_std``.

    Raises:
        TrainingError: TRL would not train on all the rows.
    """
    section, lora = context.config.reward, context.config.model.lora_rank
    padding = with_pad_that_ends_no_text(tokenizer)
    if isinstance(train, Pairs):
        dataset, collate = ranking_dataset(train), collate_rankings
        section = rankings_a_step(section, max(map(len, dataset["chosen"])))
    else:
        dataset, collate = rating_dataset(train, model.config.rating_mean, model.config.rating_std), collate_ratings
    trainer = Trainer(
        model=adapt.add_lora(model, lora, context.config.model.lora_alpha) if lora else model,
        args=supervised.training_arguments(
            RewardConfig,
            section,
            context,
            max_length=None,
            remove_unused_columns=False,
            center_rewards_coefficient=section.center or None,
        ),
        data_collator=partial(collate, pad_token_id=padding.pad_token_id),
        train_dataset=dataset,
        processing_class=padding,
    )
    trainer.rows_a_step = section.batch_size
    if len(trainer.train_dataset) != len(dataset):
        raise TrainingError(
            f"reward: the trainer kept {len(trainer.train_dataset)} of {len(dataset)} training rows; "
            "this version of TRL drops rows, so install the one in constraints.txt"
        )
    return trainer


def rankings_a_step(section: Reward, pairs: int) -> Reward:
    """The batch sizes in rankings, where the largest ranking has that many pairs: a batch is at most as many pairs.

    Their number is the same for all steps, so that a ranking counts the same in each of them. A ranking that is
    larger than a (micro) batch is one by itself.
    """
    micro = section.micro_batch_size or section.batch_size
    if pairs > micro:
        log.warning(
            "reward: the largest ranking has %d pairs, more than the %d of a forward pass; it is one by itself",
            pairs,
            micro,
        )
    rankings = max(1, micro // pairs)
    steps = max(1, section.batch_size // (rankings * pairs))
    return section.model_copy(update={"batch_size": steps * rankings, "micro_batch_size": rankings})


def collate_rankings(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """R rows of ``ranking_dataset`` as tensors.

    Returns:
        ``input_ids`` and ``attention_mask`` (texts of all rankings, T); for each pair of each ranking: ``chosen`` and
        ``rejected``, which index these texts, ``margin`` and ``weight``. (P,) ``rows`` is R. Of no rows, there is one
        text that no pair has.
    """
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row["texts"]))
    batch = _texts(rows, pad_token_id)
    for side in ("chosen", "rejected"):
        places = [start + i for start, row in zip(starts, rows, strict=False) for i in row[side]]
        batch[side] = torch.tensor(places, dtype=torch.long)
    batch["margin"] = torch.tensor([margin for row in rows for margin in row["margin"]], dtype=torch.float32)
    batch["weight"] = torch.tensor(losses.ranking_weights([len(row["chosen"]) for row in rows]), dtype=torch.float32)
    return batch


def collate_ratings(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """B rows of ``rating_dataset`` as tensors: ``input_ids`` and ``attention_mask`` (B, T), ``score`` (B,), ``rows``.

    Of no rows, there is one text without a score.
    """
    return _texts(rows, pad_token_id) | {"score": torch.tensor([row["score"] for row in rows], dtype=torch.float32)}


def _texts(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    texts = list(chain.from_iterable(row["texts"] for row in rows)) or [[1 if pad_token_id == 0 else 0]]
    mask = supervised.padded([[1] * len(text) for text in texts], 0)
    return {
        "input_ids": supervised.padded(texts, pad_token_id),
        "attention_mask": mask,
        "rows": torch.tensor(len(rows)),
    }


def with_pad_that_ends_no_text(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy for the Trainer, which pads with its padding token and tells the model to score the last other one.

    So padding must not be end-of-sequence, with which every text ends. Any other id will do: what is behind the last
    token changes nothing before it.
    """
    padding = copy.deepcopy(tokenizer)
    if padding.pad_token_id == padding.eos_token_id:
        padding.pad_token = padding.convert_ids_to_tokens(1 if padding.eos_token_id == 0 else 0)
    return padding
