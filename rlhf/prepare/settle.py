"""Which rows stay, and which split each is in.

* The split of a prompt is decided by the sha256 of its text, unless a source says it (``file.jsonl#test``): then that
  prompt is in this split everywhere. A row whose source says another split than another source says of its prompt has
  leaked, and is dropped: what is held out is never trained on.
* Rows are in the order of another part of that hash. ``data.max_*`` keep the first rows in this order, so the
  first N rows of a file are a random sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rlhf.config.data import Data
from rlhf.errors import show
from rlhf.prepare.problems import BadRows
from rlhf.prepare.reading import Places, Reading
from rlhf.prepare.sources import SPLITS
from rlhf.prepare.spool import POINT, ROW, SPLIT, Spool, Written, digest, key_bytes

PROMPT_BYTES = 24  # of a key, that come from its first text
REFERENCES = ("reference", "references")  # of a prompt: the first one; all of them, where some prompt has several


def split_of(prompt: str, validation_fraction: float, test_fraction: float) -> str:
    """The split of a prompt: ``train``, ``validation`` or ``test``, by the sha256 of its text.

    Whether a prompt is in ``test`` does not depend on ``validation_fraction``.
    """
    points = np.array([int.from_bytes(digest(prompt)[:8], "big")], np.uint64)
    return SPLITS[int(hashed_splits(points, validation_fraction, test_fraction)[0])]


def hashed_splits(points: NDArray[np.uint64], validation_fraction: float, test_fraction: float) -> NDArray[np.int8]:
    """The index in ``SPLITS`` of points in [0, 2^64), (N,)."""
    share = points.astype(np.float64) / 2.0**64
    held_out = np.where(share < test_fraction + validation_fraction, 1, 0)
    found: NDArray[np.int8] = np.where(share < test_fraction, 2, held_out).astype(np.int8)
    return found


class Stated:
    """The splits that sources say, by prompt: where they differ, test goes before validation before train."""

    def __init__(self, readings: Sequence[Reading]) -> None:
        points = np.concatenate([np.empty(0, np.uint64), *(p for reading in readings for p, _ in reading.stated)])
        splits = np.concatenate([np.empty(0, np.int8), *(s for reading in readings for _, s in reading.stated)])
        order = np.lexsort([-splits, points])
        self._points, first = np.unique(points[order], return_index=True)
        self._splits = splits[order][first]

    def of(self, points: NDArray[np.uint64], otherwise: NDArray[np.int8]) -> NDArray[np.int8]:
        """The split of each point: the one that is said, else ``otherwise``. All (N,)."""
        if not len(self._points):
            return otherwise
        places = np.searchsorted(self._points, points).clip(max=len(self._points) - 1)
        known = self._points[places] == points
        return np.where(known, self._splits[places], otherwise)


class Settled:
    """The rows of one kind that stay, in their order, on the disk; and how many went, by reason."""

    def __init__(self, kind: str, places: Places, texts: Sequence[str], rows: Written, read: int) -> None:
        self.kind, self.where, self.places = kind, f"data.{kind}", places
        self.texts, self.rows, self.read = tuple(texts), rows, read
        self.lost: Counter[str] = Counter()
        self.splits: Counter[str] = Counter()

    @property
    def kept(self) -> int:
        return self.rows.rows

    def training_texts(self, most: int) -> Iterator[str]:
        """The texts of the first rows of the training split, without the references."""
        names = [name for name in self.texts if name not in REFERENCES]
        for table in self.rows.tables():
            rows = table.filter(pc.equal(table[SPLIT], SPLITS.index("train"))).slice(0, most)
            most -= rows.num_rows
            for name in names:
                if rows.schema.field(name).type == pa.string():
                    yield from rows[name].to_pylist()
                elif rows.schema.field(name).type == pa.list_(pa.string()):
                    yield from chain.from_iterable(rows[name].to_pylist())


def settle(reading: Reading, spool: Spool, stated: Stated, data: Data, path: Path) -> Settled:
    """Put the rows of a spool in order; drop what has leaked, is repeated, or is over the limit.

    Raises:
        DataError: there are repeated rows, and ``data.duplicates`` is `error`.
    """
    assert spool.schema is not None
    rows = Written(path, spool.schema)
    settled = Settled(reading.kind, reading.places, reading.texts, rows, reading.count)
    settled.lost.update({"duplicate": 0, "over_limit": 0})
    bad = BadRows(reading.where, "repeated")
    most = getattr(data, f"max_{reading.kind}")
    for table in spool.tables():
        table = _with_splits(table, stated, data, settled)
        table = _once(table, settled, bad, data.duplicates)
        if most is not None:
            left = max(0, most - rows.rows)
            settled.lost["over_limit"] += max(0, table.num_rows - left)
            table = table.slice(0, left)
        rows.add(table)
        count_splits(settled.splits, table)
    rows.close()
    bad.check("Keep one of each, or set data.duplicates: drop.")
    return settled


def count_splits(counts: Counter[str], table: pa.Table) -> None:
    """Count a table's rows by split."""
    numbers = np.bincount(table[SPLIT].to_numpy(), minlength=len(SPLITS))
    counts.update(dict(zip(SPLITS, numbers.tolist(), strict=True)))


def _with_splits(table: pa.Table, stated: Stated, data: Data, settled: Settled) -> pa.Table:
    """The rows with their splits, less those that have leaked."""
    own, points = table[SPLIT].to_numpy(), table[POINT].to_numpy()
    splits = stated.of(points, hashed_splits(points, data.validation_fraction, data.test_fraction))
    table = table.set_column(table.column_names.index(SPLIT), SPLIT, pa.array(splits, pa.int8()))
    leaked = (own >= 0) & (own != splits)
    if leaked.any():
        settled.lost["leaked"] += int(leaked.sum())
        table = table.filter(pa.array(~leaked))
    return table


def _once(table: pa.Table, settled: Settled, bad: BadRows, policy: str) -> pa.Table:
    """The rows without those that repeat an earlier one; equal rows are neighbours, the input's first one first."""
    width = PROMPT_BYTES if settled.kind == "prompts" else None
    keys = key_bytes(table)[:, :width]
    repeated = np.zeros(len(keys), bool)
    repeated[1:] = (keys[1:] == keys[:-1]).all(axis=1)
    if not repeated.any():
        return table
    settled.lost["duplicate"] += int(repeated.sum())
    if policy == "error":
        numbers = table[ROW].to_numpy()
        first = np.maximum.accumulate(np.where(repeated, 0, np.arange(len(keys))))
        names = settled.texts[:1] if settled.kind == "prompts" else settled.texts
        for index in np.flatnonzero(repeated):
            row, before = int(numbers[index]), settled.places.place(int(numbers[first[index]]))
            text = table[settled.texts[0]][int(index)].as_py()
            words = f"has the same {' and '.join(names)} as {before}: {show(text)}"
            bad.add(settled.places.place(row), words, order=row)
    return table.filter(pa.array(~repeated))
