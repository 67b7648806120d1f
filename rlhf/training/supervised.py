"""The Hugging Face Trainer of the supervised stages, made to resume exactly and to report here.

The optimizer steps of a Trainer are a function of the seed, the rows and the settings alone: rows come in an order
that is computed from seed and epoch, and a run that resumes from a checkpoint ends with the same weights and the
same journal, bit for bit on a CPU, as one that was never interrupted.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from rlhf.errors import StoppedError, TrainingError
from rlhf.store import checkpoints, disk
from rlhf.training import computing, processes
from rlhf.training.callback import MARK, PipelineCallback, not_finite

if TYPE_CHECKING:
    from transformers import Trainer

    from rlhf.config.supervised import Supervised
    from rlhf.context import Context

log = logging.getLogger(__name__)

A = TypeVar("A", bound=TrainingArguments)

SORTED_TOGETHER = 50  # batches whose rows are sorted by length among themselves

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def training_arguments(cls: type[A], section: Supervised, context: Context, **extra: Any) -> A:
    """The arguments of a Hugging Face Trainer for one of the supervised stages.

    Checkpoints fall on logged steps (``checkpoint_every`` is rounded up to a multiple of ``log_every``), as a Trainer
    forgets at a resume what it has averaged since the last log. Nothing is sent anywhere, printed, or drawn.

    Several processes share out each batch; ``PipelineTrainer.rows_a_step`` is its whole size.

    Args:
        cls: ``SFTConfig`` or ``RewardConfig``, or any other kind of ``TrainingArguments``.
        extra: further arguments of ``cls``.
    """
    config, device = context.config, computing.device_of(context.config.resources)
    share = math.ceil(section.batch_size / processes.count())
    micro_batch = min(section.micro_batch_size or share, share)
    arguments: A = cls(
        output_dir=str(context.checkpoints),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=math.ceil(share / micro_batch),
        num_train_epochs=section.epochs,
        max_steps=section.max_steps or -1,
        optim="adamw_torch_fused",
        learning_rate=section.learning_rate,
        lr_scheduler_type=SCHEDULES[section.schedule],
        warmup_steps=min(section.warmup_fraction, 1 - 1e-9),  # below 1 it is a share, from 1 on a number of steps
        weight_decay=section.weight_decay,
        adam_beta2=section.beta2,
        max_grad_norm=section.max_grad_norm,
        logging_steps=section.log_every,
        logging_nan_inf_filter=False,  # it would replace a loss that is not finite by the mean of the others
        save_strategy="steps",
        save_steps=math.ceil(section.checkpoint_every / section.log_every) * section.log_every,
        eval_strategy="no",
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=device.type == "cpu",
        bf16=computing.mixed_precision(config.resources) == "bf16",
        fp16=computing.mixed_precision(config.resources) == "fp16",
        use_cache=True,  # in the configuration that is saved; the trainers' own forward passes do without
        activation_checkpointing=config.model.gradient_checkpointing,
        dataloader_pin_memory=device.type == "cuda",
        report_to=[],
        disable_tqdm=True,
        **extra,
    )
    if arguments.n_gpu > 1:  # one process takes one GPU; a Trainer would spread over all that it sees
        arguments._n_gpu = 1
    return arguments


class PipelineTrainer:
    """Comes before a TRL trainer in the bases of a class: exact order of rows, losses checked, no traces elsewhere.

    ``train_dataset`` must have a column ``length``, in tokens. ``rows_a_step`` is the size of a whole batch, which
    several processes share out; the data collator then makes a batch that counts nothing of no rows.
    """

    stage: str
    rows_a_step: int
    args: TrainingArguments
    state: TrainerState
    train_dataset: Any
    data_collator: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return LengthGroupedSampler(self.train_dataset["length"], self.rows_a_step, self.args.seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Rows in the sampler's order, shared out if there are several processes."""
        if processes.count() == 1:
            loader: DataLoader[Any] = super().get_train_dataloader()  # type: ignore[misc]
            return loader
        order, micro_batch = self._get_train_sampler(), self.args.train_batch_size
        shares = processes.Shares(order, self.rows_a_step, micro_batch, processes.index(), processes.count())
        pin = self.args.dataloader_pin_memory
        return processes.SharedLoader(self.train_dataset, shares, collate_fn=self.data_collator, pin_memory=pin)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss):
            raise TrainingError(not_finite("loss", loss.item(), self.stage, self.state.global_step + 1))
        return loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes a README.md beside the checkpoints; none is wanted."""

    def _send_telemetry(self) -> None:
        """TRL sends model architecture and hardware to the hub when a trainer is made; nothing is sent from here."""


class LengthGroupedSampler(Sampler[int]):
    """Every row once an epoch, rows of similar length in one batch, so that little is computed on padding.

    The order is a function of seed and epoch. (transformers' own sampler of this name draws from the global
    generator, so that an epoch that is entered a second time, on resuming, has another order.)
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self._seed, self._epoch))
        rows, size = generator.permutation(len(self)), self._batch_size
        batches: list[np.ndarray[Any, Any]] = []
        for start in range(0, len(rows), size * SORTED_TOGETHER):
            chunk = rows[start : start + size * SORTED_TOGETHER]
            chunk = chunk[np.argsort(-self._lengths[chunk], kind="stable")]
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        partial = [batch for batch in batches if len(batch) < size]  # at most one; batches are cut from the start
        whole = [batch for batch in batches if len(batch) == size]
        for index in generator.permutation(len(whole)):
            yield from whole[index].tolist()
        for batch in partial:
            yield from batch.tolist()


def resume_from(context: Context) -> Path | None:
    """The checkpoint to go on from: the newest that verifies, or None. The others that are newer are deleted.

    The stage's journal is cut back to where it was then. Several processes find the same one.
    """
    with processes.first_one_first():  # what process 0 has deleted, the others do not find
        path = checkpoints.latest(context.checkpoints)
        checkpoints.drop_after(context.checkpoints, path)
    if path is None:
        return None
    context.tracker.rewind(json.loads((path / MARK).read_text(encoding="utf-8"))["mark"])
    log.info("%s: resuming from step %d", context.stage, checkpoints.step_of(path))
    return path


def train(
    trainer: Trainer,
    context: Context,
    checkpoint: Path | None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    trainings: int = 1,
) -> None:
    """Run a Trainer to its end, from a checkpoint of ``resume_from`` or from the start.

    There must be room on the disk for that many ``trainings`` like it, of this one and those after it.

    Several processes all call ``evaluate`` and reckon the same; process 0 logs it. Once this returns, none of them
    needs another.

    Raises:
        StorageError: there is no room for the checkpoints.
        StoppedError: ``context.stop`` was asked, and a checkpoint is written.
        TrainingError: a loss or gradient is not finite; the checkpoints before it are kept.
    """
    trainer.stage = context.stage
    _check_room(trainer.model, context, trainings)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(PipelineCallback(context, evaluate))
    if processes.index():  # processes drop out different activations; adapters and heads are those of process 0 anyway
        computing.seed_everything(context.config.seed + processes.index())
    with computing.quiet():
        if not _taken_up_whole(trainer, checkpoint):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if (step := trainer.state.global_step) < trainer.state.max_steps:
        raise StoppedError(f"{context.stage}: ended after step {step} of {trainer.state.max_steps}, as asked")


def _taken_up_whole(trainer: Trainer, checkpoint: Path | None) -> bool:
    """Load the checkpoint of a last step; whether it is one. In mid-epoch, a Trainer would train on from there."""
    if checkpoint is None:
        return False
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if state.global_step < state.max_steps:
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    return True


def _check_room(model: torch.nn.Module, context: Context, trainings: int) -> None:
    """A checkpoint has all weights of a model, or its adapters."""
    learning, every = computing.trainable_parameters(model), computing.bytes_of(model.parameters())
    saved = (
        computing.bytes_of(p for p in model.parameters() if p.requires_grad)
        if context.config.model.lora_rank
        else every
    )
    wanted = trainings * disk.training_bytes(saved, learning, every)
    disk.check_room(context.checkpoints, wanted, f"{context.stage}, with its checkpoints,")


# ---------------------------------------------------------------------------------------------------- small helpers
def last_logged(trainer: Trainer, name: str) -> float:
    """The value that a Trainer logged last under a name."""
    return next(float(entry[name]) for entry in reversed(trainer.state.log_history) if name in entry)


def batches_by_length(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of all rows in batches of similar length, longest first."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows of numbers as one tensor (B, T), filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
