"""Reward-model training on preference pairs, with TRL's RewardTrainer.

The model reads prompt + response + end-of-sequence, tokenized as one text, and gives one score, read at the last
token. The loss of a pair is -log sigmoid(score of chosen - score of rejected) (Bradley and Terry 1952). Scores are
then shifted so that the demonstrated responses score 0 on average (Stiennon et al. 2020): with ``score_mean`` and
``score_std`` of the model's configuration, score = (logit - score_mean) / score_std.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from rlhf import adapt, models, training
from rlhf.errors import DataError, ModelError
from rlhf.intervals import Floats, bootstrap_interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.context import Context

REFERENCES = 2000  # SFT references that the mean score is taken over, at most
TRAIN_SCORES = 500  # training pairs in scores.parquet, at most
RESAMPLES, CONFIDENCE = 1000, 0.95  # of the accuracy's bootstrap interval


class Pairs(NamedTuple):
    """The two texts of each of N preference pairs, as token ids."""

    chosen: list[list[int]]
    rejected: list[list[int]]


class Scores(NamedTuple):
    """The scores of each of N preference pairs, (N,) and (N,)."""

    chosen: Floats
    rejected: Floats


class Trainer(training.PipelineTrainer, RewardTrainer):  # type: ignore[misc]
    """TRL's trainer with an order of rows that can be resumed, and losses checked."""


def run(context: Context) -> dict[str, float]:
    """Train on the pairs of the training split; write ``model/``, adapters merged, and ``scores.parquet``.

    ``scores.parquet`` has the columns ``split`` ("test": every pair; "train": the first ``TRAIN_SCORES``),
    ``chosen_score`` and ``rejected_score``, shifted like all scores, in the order of the pairs' files.

    Raises:
        ModelError: the model to start from cannot be loaded.
        DataError: a text is longer than the model's context.
        TrainingError: a loss or gradient is not finite.
    """
    config, section = context.config, context.config.reward
    training.set_up_cpu(config.resources)
    training.seed_everything(config.seed)
    model, tokenizer = _start(context)
    train, validation, test = (_pairs(context, split, tokenizer, model) for split in ("train", "validation", "test"))
    references = _references(context, tokenizer, model) or train.chosen[:REFERENCES]
    size = section.micro_batch_size or section.batch_size

    model = _trained(context, model, tokenizer, train, validation)
    mean, std = normalisation(raw_scores(model, references, size), section.normalize_std)
    model.config.score_mean, model.config.score_std = mean, std
    models.save(model, tokenizer, context.out / "model")
    first = Pairs(train.chosen[:TRAIN_SCORES], train.rejected[:TRAIN_SCORES])
    scores = {"test": score_pairs(model, test, size), "train": score_pairs(model, first, size)}
    _write_scores(context.out / "scores.parquet", scores, mean, std)
    finals = {"train_pairs": float(len(train.chosen)), "score_mean": mean, "score_std": std}
    finals |= held_out_metrics(scores["test"], config.seed)
    return {f"reward/{name}": value for name, value in finals.items()}


def _trained(
    context: Context,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Pairs,
    validation: Pairs,
) -> PreTrainedModel:
    """The model after training, adapters merged. The validation pairs are scored before, between epochs and after."""
    section, lora = context.config.reward, context.config.model.lora_rank
    trainer = Trainer(
        model=adapt.add_lora(model, lora, context.config.model.lora_alpha) if lora else model,
        args=training.training_arguments(
            RewardConfig, section, context, max_length=None, center_rewards_coefficient=section.center or None
        ),
        train_dataset=_dataset(train),
        processing_class=_with_pad_that_ends_no_text(tokenizer),
    )

    def validate() -> dict[str, float]:
        if not validation.chosen:
            return {}
        scores = score_pairs(trainer.model, validation, trainer.args.per_device_train_batch_size)
        return {"validation_loss": pair_loss(scores), "validation_accuracy": float(wins(scores).mean())}

    checkpoint = training.resume_from(context)
    if checkpoint is None:
        training.log_values(context, validate(), 0)
    training.train(trainer, context, checkpoint, validate)
    training.log_values(context, validate(), trainer.state.global_step)
    trained: PreTrainedModel = adapt.merge_lora(trainer.model) if lora else trainer.model
    return trained


# ------------------------------------------------------------------------------------------------------ the model
def _start(context: Context) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model before training, and its tokenizer."""
    path = context.config.reward.path or context.sft_model()
    options = context.model_options(path)
    try:
        model = models.load_reward_model(path, **options, dtype=context.config.model.dtype)
    except ModelError:  # it has no trained head; what else is wrong with it, the next line says too
        model = models.reward_from_policy(path, **options, dtype=context.config.model.dtype)
    return model, models.load_tokenizer(path, **options)


def _with_pad_that_ends_no_text(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy for the Trainer, which pads with its padding token and tells the model to score the last other one.

    So padding must not be end-of-sequence, with which every text ends. Any other id will do: what is behind the last
    token changes nothing before it.
    """
    padding = copy.deepcopy(tokenizer)
    if padding.pad_token_id == padding.eos_token_id:
        padding.pad_token = padding.convert_ids_to_tokens(1 if padding.eos_token_id == 0 else 0)
    return padding


@torch.no_grad()
def raw_scores(model: Any, rows: Sequence[Sequence[int]], batch_size: int) -> Floats:
    """Logits (N,) of rows of token ids that end with end-of-sequence, whatever they are batched with."""
    scores = np.zeros(len(rows))
    device = next(model.parameters()).device
    model.eval()
    for batch in training.batches_by_length(rows, batch_size):
        ids = training.padded([rows[i] for i in batch], model.config.pad_token_id).to(device)
        mask = training.padded([[1] * len(rows[i]) for i in batch], 0).to(device)
        scores[batch] = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu().numpy()
    return scores


# ------------------------------------------------------------------------------------------------------- the rows
def token_rows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, what: str
) -> list[list[int]]:
    """Token ids of texts, each with end-of-sequence at its end.

    Raises:
        DataError: a text is longer than the model's context.
    """
    if not texts:
        return []
    eos = str(tokenizer.eos_token)
    rows: list[list[int]] = tokenizer([t if t.endswith(eos) else t + eos for t in texts])["input_ids"]
    limit = getattr(model.config, "max_position_embeddings", None)
    for number, row in enumerate(rows, start=1):
        if limit is not None and len(row) > limit:
            raise DataError(
                f"{what}, row {number}: prompt, response and end-of-sequence are {len(row)} tokens, but the reward "
                f"model reads at most {limit}; lower data.max_prompt_tokens or data.max_response_tokens"
            )
    return rows


def _pairs(context: Context, split: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Pairs:
    """The preference pairs of a split, those that the judge passed on where it is on."""
    stage = "judge" if "judge" in context.inputs else "prepare"
    columns = _read(context.input(f"{stage}/preferences/{split}.parquet"), ("prompt", "chosen", "rejected"))
    chosen, rejected = (
        token_rows(_joined(columns["prompt"], columns[side]), tokenizer, model, f"{side} texts of preferences/{split}")
        for side in ("chosen", "rejected")
    )
    return Pairs(chosen, rejected)


def _references(context: Context, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[list[int]]:
    """The first demonstrations of the training split; none where the data has none."""
    if not context.has("prepare/demonstrations/train.parquet"):
        return []
    columns = _read(context.input("prepare/demonstrations/train.parquet"), ("prompt", "response"))
    texts = _joined(columns["prompt"], columns["response"])[:REFERENCES]
    return token_rows(texts, tokenizer, model, "demonstrations/train")


def _read(path: Path, columns: Sequence[str]) -> dict[str, list[str]]:
    table: dict[str, list[str]] = pq.read_table(path, columns=list(columns)).to_pydict()
    return table


def _joined(prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
    return [prompt + response for prompt, response in zip(prompts, responses, strict=True)]


def _dataset(pairs: Pairs) -> Dataset:
    lengths = [max(len(chosen), len(rejected)) for chosen, rejected in zip(*pairs, strict=True)]
    return Dataset.from_dict({"chosen_ids": pairs.chosen, "rejected_ids": pairs.rejected, "length": lengths})


# ---------------------------------------------------------------------------------------------------- the figures
def score_pairs(model: Any, pairs: Pairs, batch_size: int) -> Scores:
    """Raw scores of both sides of each pair."""
    both = raw_scores(model, list(chain(pairs.chosen, pairs.rejected)), 2 * batch_size)
    return Scores(*np.split(both, 2))


def wins(scores: Scores) -> Floats:
    """(N,): 1 where the chosen text scores higher, 1/2 where both score the same, 0 elsewhere."""
    return (np.sign(scores.chosen - scores.rejected) + 1) / 2


def pair_loss(scores: Scores) -> float:
    """The mean of -log sigmoid(chosen - rejected), in nats: ln 2 for a model that knows nothing."""
    return float(np.logaddexp(0.0, scores.rejected - scores.chosen).mean())


def normalisation(references: Floats, normalize_std: bool) -> tuple[float, float]:
    """Mean and divisor that give the references mean 0 and, if asked for, standard deviation 1."""
    spread = float(references.std()) if normalize_std else 1.0
    return float(references.mean()), spread or 1.0


def held_out_metrics(scores: Scores, seed: int) -> dict[str, float]:
    """Accuracy and loss on the test pairs, the accuracy with its bootstrap interval; nothing where there are none."""
    if not len(scores.chosen):
        return {}
    accuracy = bootstrap_interval(wins(scores), CONFIDENCE, RESAMPLES, seed)
    return {
        "test_accuracy": accuracy.value,
        "test_accuracy_low": accuracy.low,
        "test_accuracy_high": accuracy.high,
        "test_loss": pair_loss(scores),
    }


def _write_scores(path: Path, scores: dict[str, Scores], mean: float, std: float) -> None:
    columns: dict[str, Any] = {
        "split": np.repeat(list(scores), [len(of.chosen) for of in scores.values()]),
        "chosen_score": np.concatenate([(of.chosen - mean) / std for of in scores.values()]),
        "rejected_score": np.concatenate([(of.rejected - mean) / std for of in scores.values()]),
    }
    pq.write_table(pa.table(columns), path)
