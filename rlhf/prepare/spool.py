"""Rows on disk, put into the order of a key: an external bucket sort.

A row's key is a hash, so that equal ranges of it hold about as many rows each. Rows are written to one file for each
range, a *bucket*; later one bucket at a time is read and sorted. Memory holds a bucket, not the data.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rlhf.errors import DataError, show

KEY, POINT, ROW, SPLIT = "__key", "__point", "__row", "__split"
"""Columns beside the data: sort key, place in [0, 2^64) that decides the split, number in the input, stated split."""
INTERNAL = (KEY, POINT, ROW, SPLIT)

WRITE = 2**26  # bytes of rows in memory before they go to their buckets
BUCKET = 2**25  # bytes that a bucket is to have


class Keys(NamedTuple):
    """Of N rows: ``keys`` (N, 56) bytes, which order them, and ``points`` (N,), which decide their splits."""

    keys: NDArray[np.uint8]
    points: NDArray[np.uint64]


def digest(*texts: str) -> bytes:
    """The sha256 of texts."""
    return hashlib.sha256("\0".join(texts).encode()).digest()


def keys_of(firsts: Sequence[str], others: Sequence[Sequence[str]]) -> Keys:
    """Keys by a first text, and where that is the same by others; rows with the same first text are neighbours.

    The first 8 bytes of the first text's digest are the point, the others are in the key: the order of rows says
    nothing about their splits.
    """
    heads = [digest(first) for first in firsts]
    raw = b"".join(head[8:] + digest(*texts) for head, texts in zip(heads, others, strict=True))
    points = np.frombuffer(b"".join(head[:8] for head in heads), ">u8").astype(np.uint64)
    return Keys(np.frombuffer(raw, np.uint8).reshape(-1, 56), points)


class Spool:
    """Tables on disk by bucket. All have the same columns; ``schema``, set before reading, says their final types.

    Args:
        place: of a row by its number, for messages.
    """

    def __init__(self, folder: Path, expected_bytes: int, where: str, place: Callable[[int], str]) -> None:
        folder.mkdir(parents=True)
        bits = max(0, min(8, (max(expected_bytes, 1) // BUCKET).bit_length()))
        self._shift = 8 - bits
        self._paths = [folder / f"{number:03}.arrows" for number in range(2**bits)]
        self._where, self._place = where, place
        self._waiting: list[pa.Table] = []
        self._bytes = 0
        self.schema: pa.Schema | None = None

    def add(self, table: pa.Table) -> None:
        """Add rows, which have the columns ``INTERNAL``."""
        if table.num_rows:
            self._waiting.append(table)
            self._bytes += table.nbytes
            if self._bytes >= WRITE:
                self.flush()

    def flush(self) -> None:
        """Write what waits to the buckets."""
        for table in self._waiting:
            numbers = key_bytes(table)[:, 0] >> self._shift
            for number in np.unique(numbers):
                rows = table.take(pa.array(np.flatnonzero(numbers == number)))
                with self._paths[number].open("ab") as file, pa.ipc.new_stream(file, rows.schema) as writer:
                    writer.write_table(rows)
        self._waiting, self._bytes = [], 0

    def tables(self) -> Iterator[pa.Table]:
        """The rows in their order, bucket by bucket; the buckets are deleted behind.

        Raises:
            DataError: a value cannot have the final type of its column.
        """
        assert self.schema is not None
        self.flush()
        for path in self._paths:
            if path.exists():
                table = pa.concat_tables(self._cast(part, self.schema) for part in _segments(path)).combine_chunks()
                path.unlink()
                keys = key_bytes(table).view(">u8")
                columns = [keys[:, i] for i in range(keys.shape[1])]
                order = np.lexsort([table[ROW].to_numpy(), *reversed(columns)])
                yield table.take(pa.array(order))

    def _cast(self, table: pa.Table, schema: pa.Schema) -> pa.Table:
        """The table with the types of a schema; a column that it lacks is null."""
        columns: list[Any] = []
        for field in schema:
            if field.name not in table.column_names or pa.types.is_null(field.type):
                columns.append(pa.nulls(table.num_rows, field.type))
                continue
            column = table[field.name]
            try:
                columns.append(_exactly(column, field.type))
            except pa.ArrowInvalid as error:
                row = bisect_left(range(len(column) - 1), True, key=lambda i: not _fits(column[: i + 1], field.type))
                raise DataError(
                    f"{self._where}: {self._place(table[ROW][row].as_py())}, column {field.name!r}: "
                    f"{show(column[row].as_py())} is not of the type of other rows, {field.type} ({error}); give all "
                    "rows one type"
                ) from None
        return pa.table(columns, schema=schema)


def key_bytes(table: pa.Table) -> NDArray[np.uint8]:
    """The keys of a table's rows, (N, 56)."""
    chunks = [
        np.frombuffer(c.buffers()[1], np.uint8)[c.offset * 56 : (c.offset + len(c)) * 56] for c in table[KEY].chunks
    ]
    return np.concatenate(chunks).reshape(-1, 56) if chunks else np.empty((0, 56), np.uint8)


def key_array(keys: NDArray[np.uint8]) -> pa.Array:
    """Keys (N, 56) as a column."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(56), len(keys), [None, pa.py_buffer(keys.tobytes())])


def _segments(path: Path) -> Iterator[pa.Table]:
    """The tables of a bucket: streams one after the other, each with types of its own."""
    with pa.OSFile(str(path), "rb") as file:
        while file.tell() < file.size():
            with pa.ipc.open_stream(file) as reader:
                yield reader.read_all()


def _exactly(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """The column in another type; ``pa.ArrowInvalid`` where a value has no such one, or whole numbers lose digits."""
    if pa.types.is_string(column.type) and pa.types.is_floating(kind):  # cells of a CSV file
        column.filter(pc.match_substring_regex(column, r"^-?[0-9]{16,}$")).cast(pa.int64()).cast(kind)
    return column.cast(kind)


def _fits(column: pa.ChunkedArray, kind: pa.DataType) -> bool:
    try:
        _exactly(column, kind)
    except pa.ArrowInvalid:
        return False
    return True


class Written:
    """A table in one file, written and read in parts."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self.schema = path, schema
        self._writer = pa.ipc.new_file(str(path), schema)
        self.rows = 0

    def add(self, table: pa.Table) -> None:
        """Add rows."""
        if table.num_rows:
            self._writer.write_table(table)
            self.rows += table.num_rows

    def close(self) -> None:
        """End writing."""
        self._writer.close()

    def tables(self) -> Iterator[pa.Table]:
        """The rows, in parts."""
        with pa.OSFile(str(self._path), "rb") as file, pa.ipc.open_file(file) as reader:
            for number in range(reader.num_record_batches):
                yield pa.Table.from_batches([reader.get_batch(number)])
