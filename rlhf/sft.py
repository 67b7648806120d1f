"""Supervised fine-tuning: the base model learns the demonstrated responses, with TRL's SFTTrainer.

A row is ids(prompt) + ids(response) + end-of-sequence, the parts tokenized apart, so that the policy is trained on
the very prompt tokens that it is given in a rollout. The loss is the mean negative log-likelihood, in nats, over the
response tokens of a batch, end-of-sequence included; prompts are read, not learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from rlhf import adapt, models, training
from rlhf.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from rlhf.context import Context

IGNORED = -100  # label of a token that the loss does not count


class Row(NamedTuple):
    """One demonstration: token ids, and the same as labels with the prompt's ones ``IGNORED``."""

    input_ids: list[int]
    labels: list[int]


class Trainer(training.PipelineTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with logits for response positions only; its own loss takes twice the time on a CPU."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Sum over the response tokens of a micro-batch, divided by those of the whole batch."""
        total, count = response_loss(model, inputs)
        return total / (count if num_items_in_batch is None else num_items_in_batch)


def run(context: Context) -> dict[str, float]:
    """Train on the demonstrations of the training split; write ``model/``, adapters merged.

    Returns:
        ``sft/final_loss``: mean over the last ``log_every`` steps; ``sft/validation_loss``: of the trained model, also
        logged after each epoch; ``sft/tokens``: response tokens of an epoch; ``sft/trainable_parameters``.

    Raises:
        ModelError: the base model cannot be loaded, or is an encoder-decoder.
        TrainingError: a loss or gradient is not finite.
    """
    config = context.config
    training.set_up_cpu(config.resources)
    training.seed_everything(config.seed)
    base = context.base_model()
    tokenizer = models.load_tokenizer(base, **context.model_options(base))
    model: Any = models.load_policy(base, **context.model_options(base))
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"model {base!r} is an encoder-decoder ({model.config.model_type}), which the sft stage does not train; "
            "leave it out with `sft: off` and start from a model that is fine-tuned already"
        )
    if config.model.lora_rank:
        model = adapt.add_lora(model, config.model.lora_rank, config.model.lora_alpha)
    rows, held_out = (
        read_rows(context.input(f"prepare/demonstrations/{split}.parquet"), tokenizer)
        for split in ("train", "validation")
    )
    trainer = Trainer(
        model=model,
        args=training.training_arguments(
            SFTConfig, config.sft, context, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
        ),
        train_dataset=_dataset(rows),
        processing_class=tokenizer,
    )
    size = trainer.args.per_device_train_batch_size

    def validate() -> dict[str, float]:
        return {"validation_loss": mean_loss(trainer.model, held_out, size)} if held_out else {}

    training.train(trainer, context, training.resume_from(context), validate)
    final = validate()
    trained = trainer.model
    trainable = training.trainable_parameters(trained)
    if config.model.lora_rank:
        trained = adapt.merge_lora(trained)
    models.save(trained, tokenizer, context.out / "model")
    training.log_values(context, final, trainer.state.global_step)
    return {
        "sft/final_loss": training.last_logged(trainer, "loss"),
        **{f"sft/{name}": value for name, value in final.items()},
        "sft/tokens": float(sum(label != IGNORED for row in rows for label in row.labels)),
        "sft/trainable_parameters": float(trainable),
    }


def read_rows(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The demonstrations of a file with the columns ``prompt`` and ``response``, in its order."""
    table = pq.read_table(path, columns=["prompt", "response"]).to_pydict()
    if not table["prompt"]:
        return []
    prompts = models.prompt_token_ids(tokenizer, table["prompt"])
    responses = tokenizer(table["response"], add_special_tokens=False)["input_ids"]
    return [
        _row(prompt, [*response, tokenizer.eos_token_id]) for prompt, response in zip(prompts, responses, strict=True)
    ]


def _row(prompt: list[int], response: list[int]) -> Row:
    return Row(prompt + response, [IGNORED] * len(prompt) + response)


def _dataset(rows: Sequence[Row]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rows],
            "labels": [row.labels for row in rows],
            "length": [len(row.input_ids) for row in rows],
        }
    )


def response_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of -log p over the tokens of a batch that have a label, in nats, and their number.

    Args:
        inputs: ``input_ids``, ``attention_mask`` and ``labels``, each (B, T). Position t predicts label t + 1, so the
            first label never counts.
    """
    labels = inputs["labels"][:, 1:]
    places = (labels != IGNORED).any(0).nonzero()[:, 0]  # positions with a label in any row of the batch
    labels = labels[:, places].flatten()
    output = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, logits_to_keep=places
    )
    logits = output.logits.flatten(0, 1).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"), (labels != IGNORED).sum()


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Sequence[Row], batch_size: int) -> float:
    """The loss over rows: the mean over all of their response tokens, in nats, whatever the batch size."""
    device = next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    for batch in training.batches_by_length([row.input_ids for row in rows], batch_size):
        inputs = {
            "input_ids": training.padded([rows[i].input_ids for i in batch], 0),
            "labels": training.padded([rows[i].labels for i in batch], IGNORED),
            "attention_mask": training.padded([[1] * len(rows[i].input_ids) for i in batch], 0),
        }
        loss, tokens = response_loss(model, {name: tensor.to(device) for name, tensor in inputs.items()})
        total, count = total + loss.item(), count + int(tokens)
    return total / count
