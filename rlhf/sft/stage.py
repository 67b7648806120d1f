"""Supervised fine-tuning: the base model learns the demonstrated responses, with TRL's SFTTrainer.

A row of a causal model is ids(prompt) + ids(response) + end-of-sequence, the parts tokenized apart, so that the policy
is trained on the very prompt tokens that it is given in a rollout. An encoder-decoder, trained with transformers'
Seq2SeqTrainer, has ids(prompt) in its encoder and ids(response) + end-of-sequence in its decoder, each as in a rollout.
The loss is the mean negative log-likelihood, in nats, over the response tokens of a batch, end-of-sequence included;
prompts are read, not learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from trl import SFTConfig, SFTTrainer

from rlhf.models import adapt, loading
from rlhf.training import computing, processes, supervised
from rlhf.training.callback import log_values

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.context import Context

IGNORED = -100  # label of a token that the loss does not count
NOTHING = {"input_ids": [0, 0], "labels": [IGNORED, IGNORED]}


class Row(NamedTuple):
    """One demonstration: token ids, and the same as labels with the prompt's ones ``IGNORED``.

    For an encoder-decoder, the ids of the prompt, and the response's as labels.
    """

    input_ids: list[int]
    labels: list[int]


class ResponseLoss(supervised.PipelineTrainer):
    """A trainer of ``response_loss``, whatever the model's own loss."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Sum over the response tokens of a micro-batch, divided by those of the whole batch of all processes."""
        total, count = response_loss(model, inputs)
        if num_items_in_batch is None:
            return total / count
        return total / num_items_in_batch * processes.count()  # gradients and losses are averaged over the processes


class CausalTrainer(ResponseLoss, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with logits for response positions only; its own loss takes twice the time on a CPU."""


class EncoderDecoderTrainer(ResponseLoss, Seq2SeqTrainer):  # type: ignore[misc]
    """transformers' trainer, with the loss, the order of rows and the checks of the causal one."""


def run(context: Context) -> dict[str, float]:
    """Train on the demonstrations of the training split; write ``model/``, adapters merged.

    Of several processes, the first one writes and returns the figures; the others end with the training.

    Returns:
        ``sft/final_loss``: mean over the last ``log_every`` steps; ``sft/validation_loss``: of the trained model, also
        logged after each epoch; ``sft/tokens``: response tokens of an epoch; ``sft/trainable_parameters``.

    Raises:
        ModelError: the base model cannot be loaded.
        TrainingError: a loss or gradient is not finite.
    """
    config = context.config
    computing.set_up_cpu(config.resources)
    computing.seed_everything(config.seed)
    base = context.base_model()
    tokenizer = loading.load_tokenizer(base, **context.model_options(base))
    model: Any = loading.load_policy(base, **context.model_options(base), dtype=config.model.dtype)
    encoder = bool(model.config.is_encoder_decoder)
    if config.model.lora_rank:
        model = adapt.add_lora(model, config.model.lora_rank, config.model.lora_alpha)
    rows, held_out = (
        read_rows(context.input(f"prepare/demonstrations/{split}.parquet"), tokenizer, encoder)
        for split in ("train", "validation")
    )
    trainer = _trainer(model, tokenizer, rows, context)
    size = trainer.args.per_device_train_batch_size

    def validate() -> dict[str, float]:
        return {"validation_loss": mean_loss(trainer.model, held_out, size)} if held_out else {}

    supervised.train(trainer, context, supervised.resume_from(context), validate)
    if processes.index():
        return {}
    final = validate()
    trained = trainer.model
    trainable = computing.trainable_parameters(trained)
    if config.model.lora_rank:
        trained = adapt.merge_lora(trained)
    loading.save(trained, tokenizer, context.out / "model")
    log_values(context, final, trainer.state.global_step)
    return {
        "sft/final_loss": supervised.last_logged(trainer, "loss"),
        **{f"sft/{name}": value for name, value in final.items()},
        "sft/tokens": float(sum(label != IGNORED for row in rows for label in row.labels)),
        "sft/trainable_parameters": float(trainable),
    }


def _trainer(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], context: Context) -> Any:
    """The trainer of a model with or without adapters."""
    encoder = model.config.is_encoder_decoder
    kind, options, extra = (
        (EncoderDecoderTrainer, Seq2SeqTrainingArguments, {})
        if encoder
        else (CausalTrainer, SFTConfig, {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}})
    )
    trainer = kind(
        model=model,
        args=supervised.training_arguments(options, context.config.sft, context, **extra),
        train_dataset=_dataset(rows, encoder),
        data_collator=collate,
        processing_class=tokenizer,
    )
    trainer.rows_a_step = context.config.sft.batch_size
    trainer.model_accepts_loss_kwargs = True  # it is our loss that takes the batch's number of tokens, not the model's
    return trainer


def read_rows(path: Path, tokenizer: PreTrainedTokenizerBase, encoder: bool = False) -> list[Row]:
    """The demonstrations of a file with the columns ``prompt`` and ``response``, in its order.

    With ``encoder``, as an encoder-decoder reads them.
    """
    table = pq.read_table(path, columns=["prompt", "response"]).to_pydict()
    if not table["prompt"]:
        return []
    prompts = loading.prompt_token_ids(tokenizer, table["prompt"], encoder)
    responses = tokenizer(table["response"], add_special_tokens=False)["input_ids"]
    pairs = zip(prompts, ([*response, tokenizer.eos_token_id] for response in responses), strict=True)
    if encoder:
        return [Row(prompt, response) for prompt, response in pairs]
    return [Row(prompt + response, [IGNORED] * len(prompt) + response) for prompt, response in pairs]


def _dataset(rows: Sequence[Row], encoder: bool) -> Dataset:
    """Rows with their lengths: tokens of prompt and response."""
    lengths = [len(row.input_ids) + (len(row.labels) if encoder else 0) for row in rows]
    return Dataset.from_list([row._asdict() | {"length": length} for row, length in zip(rows, lengths, strict=True)])


def collate(rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
    """A batch of rows, each part padded on the right: ``input_ids``, ``attention_mask`` and ``labels``, each (B, T).

    The mask comes from lengths: padding may be end-of-sequence, and an encoder reads positions that count from 0.
    No rows are one without a label, which adds nothing to a loss.
    """
    rows = rows or [NOTHING]
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": supervised.padded(ids, 0),
        "attention_mask": supervised.padded([[1] * len(row) for row in ids], 0),
        "labels": supervised.padded([row["labels"] for row in rows], IGNORED),
    }


def response_loss(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of -log p over the tokens of a batch that have a label, in nats, and their number.

    Args:
        inputs: as ``collate`` makes them. In a causal model position t predicts label t + 1, so the first label never
            counts; in an encoder-decoder, position t of the decoder, which reads label t - 1, predicts label t.
    """
    config = getattr(model, "module", model).config  # several processes wrap the model
    labels, seen = inputs["labels"], {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if config.is_encoder_decoder:
        read = decoder_input_ids(labels, config.decoder_start_token_id)
        output = model(**seen, decoder_input_ids=read, use_cache=False)
    else:
        labels = labels[:, 1:]
        places = (labels != IGNORED).any(0).nonzero()[:, 0]  # positions with a label in any row of the batch
        labels = labels[:, places]
        output = model(**seen, use_cache=False, logits_to_keep=places)
    labels, logits = labels.flatten(), output.logits.flatten(0, 1).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"), (labels != IGNORED).sum()


def decoder_input_ids(labels: Tensor, start: int) -> Tensor:
    """What a decoder reads, (B, T): its start token, then the labels (B, T) without their last column.

    It needs no mask: attention is causal, and no label comes after a row's padding.
    """
    before = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, 0)
    return torch.cat([torch.full_like(labels[:, :1], start), before], dim=1)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: Sequence[Row], batch_size: int) -> float:
    """The loss over rows: the mean over all of their response tokens, in nats, whatever the batch size."""
    device = next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    for batch in supervised.batches_by_length([row.input_ids for row in rows], batch_size):
        inputs = collate([rows[i]._asdict() for i in batch])
        loss, tokens = response_loss(model, {name: tensor.to(device) for name, tensor in inputs.items()})
        total, count = total + loss.item(), count + int(tokens)
    return total / count
