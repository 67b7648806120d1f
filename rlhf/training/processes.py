"""Trainings in several processes: how many there are, and each one's share of every batch.

``accelerate launch`` starts them. All run the same code on the same rows; a batch of an optimizer step is shared out
among them, so that their number changes neither the batches nor their order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Sampler


def count() -> int:
    """How many processes train; 1 where no launcher has started this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index() -> int:
    """The number of this process, from 0; it is 0 that writes files and logs numbers."""
    return int(os.environ.get("RANK", "0"))


def wait() -> None:
    """Return when every process is here."""
    if count() > 1:
        PartialState().wait_for_everyone()


def anyone(flag: bool) -> bool:
    """Whether the flag is set in any process. All of them ask, and all get the same answer."""
    if count() == 1:
        return flag
    flags = torch.tensor(float(flag), device=PartialState().device)
    torch.distributed.all_reduce(flags)
    return bool(flags.item())


@contextmanager
def first_one_first() -> Iterator[None]:
    """A block that process 0 runs before the others do."""
    if index() > 0:
        wait()
    yield
    if index() == 0:
        wait()


class Shares(Sampler[list[int]]):
    """The micro-batches of one process: its share of each batch that the rows of ``order`` make.

    Every process has the same number of micro-batches in a batch, so that all of them meet after each. Where rows do
    not suffice for that, as in the last batch of an epoch, a micro-batch is smaller, or empty (in process 0, none is).
    """

    def __init__(self, order: Any, batch_size: int, micro_batch_size: int, index: int, count: int) -> None:
        self._order: Any = order
        self._batch_size, self._micro_batch_size = batch_size, micro_batch_size
        self._index, self._count = index, count

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        assert isinstance(self._order, Sized)
        whole, rest = divmod(len(self._order), self._batch_size)
        return whole * self._micro_batches(self._batch_size) + self._micro_batches(rest)

    def __iter__(self) -> Iterator[list[int]]:
        rows, size = list(self._order), self._micro_batch_size
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            ours = batch[self._index :: self._count]  # rows in order of length: as long as those of the others
            for i in range(self._micro_batches(len(batch))):
                yield ours[i * size : (i + 1) * size]

    def _micro_batches(self, rows: int) -> int:
        return math.ceil(rows / (self._count * self._micro_batch_size))


class SharedLoader(DataLoader[Any]):
    """Loads what ``Shares`` names. A Trainer takes it as it is; accelerate's own would share the shares out again."""

    def __init__(self, dataset: Any, shares: Shares, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=shares, **options)
        self._shares = shares

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; a Trainer that skips rows asks the batch sampler itself."""
        self._shares.set_epoch(epoch)
