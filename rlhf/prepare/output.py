"""The files of a kind, one for each split."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.prepare.sources import SPLITS
from rlhf.prepare.spool import INTERNAL, SPLIT, Written

ROW_GROUP = 65_536  # rows; fixed, so that the same rows give the same bytes


class SplitFiles:
    """Writes ``<folder>/<split>.parquet``."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True)
        self.counts = dict.fromkeys(SPLITS, 0)
        self._schema = schema
        self._writers = {
            split: pq.ParquetWriter(folder / f"{split}.parquet", schema, compression="zstd") for split in SPLITS
        }
        self._waiting: dict[str, list[pa.Table]] = {split: [] for split in SPLITS}

    def add(self, table: pa.Table) -> None:
        """Add rows with the column ``SPLIT``."""
        numbers = table[SPLIT].to_numpy()
        for number, split in enumerate(SPLITS):
            rows = table.filter(pa.array(numbers == number)).select(self._schema.names)
            if rows.num_rows:
                self._add(split, rows)

    def _add(self, split: str, rows: pa.Table) -> None:
        self.counts[split] += rows.num_rows
        waiting = self._waiting[split]
        waiting.append(rows)
        if sum(table.num_rows for table in waiting) >= ROW_GROUP:
            table = pa.concat_tables(waiting)
            whole = table.num_rows // ROW_GROUP * ROW_GROUP
            self._writers[split].write_table(table.slice(0, whole).combine_chunks(), row_group_size=ROW_GROUP)
            self._waiting[split] = [table.slice(whole).combine_chunks()]

    def close(self) -> None:
        """End all files."""
        for split, writer in self._writers.items():
            if self._waiting[split]:
                table = pa.concat_tables(self._waiting[split]).combine_chunks()
                if table.num_rows:
                    writer.write_table(table, row_group_size=ROW_GROUP)
            writer.close()


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """A schema without the internal columns."""
    return pa.schema([field for field in schema if field.name not in INTERNAL])


# ---------------------------------------------------------------------------------------------------------- rankings
def pairs_schema(schema: pa.Schema) -> pa.Schema:
    """The schema of ``pairs_of_rankings``, for that of its table."""
    rest = [field for field in schema if field.name not in ("prompt", "responses", "ranks")]
    texts = [pa.field(name, pa.string()) for name in ("prompt", "chosen", "rejected")]
    return pa.schema([*texts, pa.field("ranking", pa.int64()), *rest])


def pairs_of_rankings(table: pa.Table, start: int) -> pa.Table:
    """Every pair of two responses of each ranking of which one is better; rankings are numbered from ``start``.

    The responses are sorted, best first, or have ``ranks``: the lower is the better, and equal ones make no pair.
    """
    columns: dict[str, list[Any]] = {"chosen": [], "rejected": [], "ranking": []}
    rows: list[int] = []
    ranks = table["ranks"].to_pylist() if "ranks" in table.column_names else [None] * table.num_rows
    for row, (responses, given) in enumerate(zip(table["responses"].to_pylist(), ranks, strict=True)):
        placed = list(zip(given or range(len(responses)), responses, strict=True))
        for (one, better), (other, worse) in combinations(sorted(placed, key=lambda item: item[0]), 2):
            if one < other:
                rows.append(row)
                columns["chosen"].append(better)
                columns["rejected"].append(worse)
                columns["ranking"].append(start + row)
    made = table.take(pa.array(rows, pa.int64()))
    for name, values in columns.items():
        made = made.append_column(name, pa.array(values, pa.int64() if name == "ranking" else pa.string()))
    return made.select(pairs_schema(table.schema).names)


# ---------------------------------------------------------------------------------------------------- labelled texts
LABELLED_PAIRS = pa.schema([(name, pa.string()) for name in ("prompt", "chosen", "rejected")] + [(SPLIT, pa.int8())])


def pairs_of_texts(preferred: Written, others: Written, split: int) -> Iterator[pa.Table]:
    """Pairs of the n-th preferred text and the n-th other one, as long as there are both; their prompt is empty."""
    ours, theirs = _texts(preferred), _texts(others)
    one, other = next(ours, None), next(theirs, None)
    while one is not None and other is not None:
        rows = min(len(one), len(other))
        made = [pa.array([""] * rows), one[:rows], other[:rows], pa.array([split] * rows, pa.int8())]
        yield pa.table(made, schema=LABELLED_PAIRS)
        one = one[rows:] if len(one) > rows else next(ours, None)
        other = other[rows:] if len(other) > rows else next(theirs, None)


def _texts(rows: Written) -> Iterator[pa.Array]:
    for table in rows.tables():
        yield table["text"].combine_chunks()
