"""Reward-model training on preference pairs, rankings or ratings, with TRL's RewardTrainer.

The model reads prompt + response as one text with one end-of-sequence, and gives one score: a causal model at its last
token, an encoder where its own head reads. With ``objective: pairwise`` the loss is that of Bradley and Terry (1952);
with ``regression`` it is the squared error to the standardised rating, so that rating = logit * rating_std +
rating_mean with these two of the model's configuration.

Either way scores are then shifted so that the demonstrated responses score 0 on average (Stiennon et al. 2020): with
``score_mean`` and ``score_std`` of the model's configuration, score = (logit - score_mean) / score_std. After a
regression a score of 1 is thus one standard deviation of the ratings above the references.

With ``reward.held_out`` a second model is trained after the first one, and shifted in the same way: see
``rlhf.reward.held_out_model``.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rlhf.errors import DataError, ModelError
from rlhf.metrics import plots
from rlhf.models import adapt, loading
from rlhf.reward import accuracy, held_out_model
from rlhf.reward.accuracy import Scores
from rlhf.reward.rows import REFERENCES, Pairs, Ratings, Reader
from rlhf.reward.trainer import make_trainer
from rlhf.statistics.intervals import Floats, without_nan
from rlhf.training import computing, processes, supervised
from rlhf.training.callback import log_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.context import Context

TRAIN_SCORES = 500  # training rows in scores.parquet, at most


def run(context: Context) -> dict[str, float]:
    """Train on the training split; write ``model/`` and, of the held-out one, ``held_out/``, adapters merged.

    What follows is written of the first model, and tells what it scores.

    ``scores.parquet``, where there are pairs: the columns ``split`` ("test": every pair; "train": the first
    ``TRAIN_SCORES``), ``chosen_score`` and ``rejected_score``, in the order of the pairs' files. ``ratings.parquet``,
    where there are ratings: ``split``, ``rating`` and ``score``. Both shifted like all scores. ``calibration.json`` has
    the held-out figures, ``calibration.png`` the reliability diagram.

    Of several processes, the first one writes and returns the figures; the others end with the training.

    Raises:
        ModelError: the model to start from cannot be loaded.
        DataError: there is nothing to train on, or a text is longer than the model's context.
        TrainingError: a loss or gradient is not finite.
    """
    config, section = context.config, context.config.reward
    computing.set_up_cpu(config.resources)
    parts, learnt = held_out_model.trainings(context), list[Learnt]()
    for left, part in zip(range(len(parts), 0, -1), parts, strict=True):
        learnt.append(learn(part, left))
        learnt[-1].model.cpu()
        gc.collect()  # its optimizer: the next training has the accelerator to itself
    if processes.index():
        return {}
    first, device = learnt[0], computing.device_of(config.resources)
    read = Reader(context, first.tokenizer, first.model)
    pairs, ratings, train = read.pairs("test"), read.ratings("test"), first.train
    references = read.references() or (train.chosen if isinstance(train, Pairs) else train.texts)[:REFERENCES]
    size, scored = section.micro_batch_size or section.batch_size, list[Scores]()
    for name, (model, tokenizer, *_) in zip(("model", held_out_model.HELD_OUT), learnt, strict=False):
        scores = raw_scores(model.to(device), references, size)
        model.config.score_mean, model.config.score_std = normalisation(scores, section.normalize_std)
        loading.save(model, tokenizer, context.out / name)
        scored.append(score_pairs(model, pairs, size))

    finals = {f"train_{_name(train)}": float(len(train[0])), "trainable_parameters": float(first.trainable)}
    finals |= {name: getattr(first.model.config, name) for name in ("score_mean", "score_std")}
    finals |= _measured(context, first.model, train, pairs, ratings, scored[0])
    if section.held_out:
        finals |= held_out_model.finals(scored[0], scored[1], config.seed)
    return {f"reward/{name}": value for name, value in finals.items()}


class Learnt(NamedTuple):
    """A model after its training, what it learnt from, and how many of its numbers learnt."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Pairs | Ratings
    trainable: int


def learn(context: Context, trainings: int = 1) -> Learnt:
    """The model that the section ``reward`` describes after its training.

    Its scores are logits still, not shifted to any references. The disk must have room for that many ``trainings``.

    Raises:
        ModelError, DataError, TrainingError: as ``run``.
    """
    computing.seed_everything(context.config.seed)
    model, tokenizer = _start(context)
    read, objective = Reader(context, tokenizer, model), context.config.reward.objective
    train, validation = (_examples(read, objective, split) for split in ("train", "validation"))
    if isinstance(train, Ratings):
        model.config.rating_mean, model.config.rating_std = _rating_scale(train)
    trained, trainable = _trained(context, model, tokenizer, train, validation, trainings)
    return Learnt(trained, tokenizer, train, trainable)


def _examples(read: Reader, objective: str, split: str) -> Pairs | Ratings:
    """The rows of a split that the objective is about.

    Raises:
        DataError: it is the training split, and there are none.
    """
    rows = read.pairs(split) if objective == "pairwise" else read.ratings(split)
    if split == "train" and not rows[0]:
        raise DataError(
            f"reward.objective is {objective}, but there are no {_name(rows)} to train on; "
            "give the data some, or set the objective (pairwise, regression) that they are for"
        )
    return rows


def _name(rows: Pairs | Ratings) -> str:
    return "pairs" if isinstance(rows, Pairs) else "ratings"


def _trained(
    context: Context,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Pairs | Ratings,
    validation: Pairs | Ratings,
    trainings: int,
) -> tuple[PreTrainedModel, int]:
    """The model after training, adapters merged, and how many numbers learnt.

    The validation rows are scored before, between epochs and after.
    """
    section = context.config.reward
    trainer = make_trainer(context, model, tokenizer, train)
    trainable = computing.trainable_parameters(trainer.model)

    def validate() -> dict[str, float]:
        return _validation(trainer.model, validation, section.micro_batch_size or section.batch_size)

    checkpoint = supervised.resume_from(context)
    if checkpoint is None:
        log_values(context, validate(), 0)
    supervised.train(trainer, context, checkpoint, validate, trainings)
    if processes.index() == 0:
        log_values(context, validate(), trainer.state.global_step)
    lora = context.config.model.lora_rank
    trained: PreTrainedModel = adapt.merge_lora(trainer.model) if lora else trainer.model
    return trained, trainable


def _validation(model: Any, rows: Pairs | Ratings, size: int) -> dict[str, float]:
    """Two figures of the validation rows, for the curves; nothing where there are none."""
    if not rows[0]:
        return {}
    if isinstance(rows, Pairs):
        scores = score_pairs(model, rows, size)
        return {
            "validation_loss": accuracy.pair_loss(scores),
            "validation_accuracy": float(accuracy.wins(scores).mean()),
        }
    logits = raw_scores(model, rows.texts, size)
    figures = accuracy.rating_report(logits, np.asarray(rows.score), scale=_scale(model, "regression")) or {}
    return {f"validation_{name}": figures[name] for name in ("loss", "pearson") if math.isfinite(figures[name])}


# ------------------------------------------------------------------------------------------------------ the model
def _start(context: Context) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model before training, and its tokenizer."""
    path = context.config.reward.path or context.sft_model()
    options = context.model_options(path)
    try:
        model = loading.load_reward_model(path, **options, dtype=context.config.model.dtype)
    except ModelError:  # it has no trained head; what else is wrong with it, the next line says too
        model = loading.reward_from_policy(path, **options, dtype=context.config.model.dtype)
    tokenizer = loading.load_tokenizer(path, **options)
    if getattr(model.config, "eos_token_id", None) is None:  # an encoder, whose [SEP] it is
        model.config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


@torch.no_grad()
def raw_scores(model: Any, rows: Sequence[Sequence[int]], batch_size: int) -> Floats:
    """Logits (N,) of rows of token ids that end with end-of-sequence, whatever they are batched with."""
    scores = np.zeros(len(rows))
    device = next(model.parameters()).device
    model.eval()
    for batch in supervised.batches_by_length(rows, batch_size):
        ids = supervised.padded([rows[i] for i in batch], model.config.pad_token_id).to(device)
        mask = supervised.padded([[1] * len(rows[i]) for i in batch], 0).to(device)
        scores[batch] = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu().numpy()
    return scores


def score_pairs(model: Any, pairs: Pairs, batch_size: int) -> Scores:
    """Raw scores of both sides of each pair; a text that is in several, as in those of a ranking, is scored once."""
    places: dict[tuple[int, ...], int] = {}
    both = [places.setdefault(tuple(row), len(places)) for row in chain(pairs.chosen, pairs.rejected)]
    return Scores(*np.split(raw_scores(model, list(places), 2 * batch_size)[both], 2))


def normalisation(references: Floats, normalize_std: bool) -> tuple[float, float]:
    """Mean and divisor that give the references mean 0 and, if asked for, standard deviation 1."""
    spread = float(references.std()) if normalize_std else 1.0
    return float(references.mean()), spread or 1.0


def _rating_scale(train: Ratings) -> tuple[float, float]:
    """Mean and standard deviation of the training ratings.

    Raises:
        DataError: they are all the same.
    """
    scores = np.asarray(train.score)
    if scores.min() == scores.max():
        raise DataError(
            f"ratings/train: all {len(scores)} scores are {scores[0]}, so there is nothing to learn from them"
        )
    return float(scores.mean()), float(scores.std())


# ---------------------------------------------------------------------------------------------------- the figures
def _measured(
    context: Context, model: PreTrainedModel, train: Pairs | Ratings, pairs: Pairs, ratings: Ratings, test: Scores
) -> dict[str, float]:
    """Score the ratings of the test split, whose pairs have been scored, and the first training rows.

    Write all files but the model; return the test figures.
    """
    section, out = context.config.reward, context.out
    size = section.micro_batch_size or section.batch_size
    pairwise, seed = section.objective == "pairwise", context.config.seed
    scored = {"test": test}
    rated = {"test": (raw_scores(model, ratings.texts, size), np.asarray(ratings.score))}
    first = train.first(TRAIN_SCORES)
    if isinstance(first, Pairs):
        scored["train"] = score_pairs(model, first, size)
    else:
        rated["train"] = raw_scores(model, first.texts, size), np.asarray(first.score)
    _write_scores(out, scored, rated, model.config.score_mean, model.config.score_std)

    lengths = Scores(*(np.array([len(row) for row in side], dtype=np.float64) for side in pairs[:2]))
    of_pairs = accuracy.pair_report(scored["test"], lengths, pairs.chosen_first, seed, probabilities=pairwise)
    of_ratings = accuracy.rating_report(*rated["test"], scale=_scale(model, section.objective))
    made = {"objective": section.objective, "pairs": of_pairs, "ratings": of_ratings}
    text = json.dumps(without_nan(made), indent=1, allow_nan=False)
    (out / "calibration.json").write_text(text + "\n", encoding="utf-8")
    if of_pairs is not None and pairwise:
        plots.reliability(out / "calibration.png", of_pairs["calibration"]["bins"])
    return accuracy.finals(of_pairs, of_ratings)


def _scale(model: Any, objective: str) -> tuple[float, float] | None:
    """Mean and standard deviation of the ratings that a model was trained on; None after training on pairs."""
    return (model.config.rating_mean, model.config.rating_std) if objective == "regression" else None


def _write_scores(
    out: Path, scored: Mapping[str, Scores], rated: Mapping[str, tuple[Floats, Floats]], mean: float, std: float
) -> None:
    """Write the logits of pairs, and those of rated texts with their ratings, as normalised scores."""
    sides = {
        split: {"chosen_score": (of.chosen - mean) / std, "rejected_score": (of.rejected - mean) / std}
        for split, of in scored.items()
    }
    scores = {split: {"rating": rating, "score": (logits - mean) / std} for split, (logits, rating) in rated.items()}
    _write_table(out / "scores.parquet", sides)
    _write_table(out / "ratings.parquet", scores)


def _write_table(path: Path, parts: Mapping[str, Mapping[str, Floats]]) -> None:
    """Write the columns of several splits one below the other, the split first; no file where there is no row."""
    lengths = {split: len(next(iter(columns.values()))) for split, columns in parts.items()}
    if not any(lengths.values()):
        return
    tables = [
        pa.table({"split": [split] * lengths[split], **columns}) for split, columns in parts.items() if lengths[split]
    ]
    pq.write_table(pa.concat_tables(tables), path)
