"""Reads all rows of one kind of data, checks them, and spools them to the disk."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.config.data import Data
from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import DataError, InputError
from rlhf.prepare import chat
from rlhf.prepare.columns import (
    BadRow,
    CellType,
    Column,
    Problem,
    check_names,
    converted,
    one_type,
    problems_of,
    typed,
)
from rlhf.prepare.computed import ComputedColumns
from rlhf.prepare.formats import Origin, Part, hub_parts, read_file
from rlhf.prepare.problems import BadRows, Quarantine
from rlhf.prepare.roles import Maker, Roles, Texts, roles_of
from rlhf.prepare.sources import SPLITS, Source, sources
from rlhf.prepare.spool import KEY, POINT, ROW, SPLIT, Spool, key_array, keys_of

TYPES = {"margin": pa.float64(), "score": pa.float64(), "preferred": pa.bool_(), "responses": pa.list_(pa.string()),
         "references": pa.list_(pa.string()), "ranks": pa.list_(pa.float64())}  # fmt: skip
# Later stages take columns of these names for what the names say, so that others do not come along under them.
MEANT = {
    "preferences": ("chosen", "rejected", "responses", "ranks", "margin", "ranking", "difference"),
    "prompts": ("references",),
}
ADVICE = "Correct these rows, or take them out, or set data.bad_rows: skip."


class Places:
    """The place of each row that was read, by its number."""

    def __init__(self) -> None:
        self._origins: list[Origin] = []
        self._starts: list[int] = []
        self.count = 0

    def add(self, origin: Origin) -> int:
        """Note more rows; the number of the first."""
        start = self.count
        numbers = origin.numbers
        compact = numbers if isinstance(numbers, range) else np.asarray(numbers)
        self._origins.append(origin._replace(numbers=compact))  # type: ignore[arg-type]
        self._starts.append(start)
        self.count += len(numbers)
        return start

    def place(self, row: int) -> str:
        """The place of a row for a message: ``my/file.jsonl line 17``."""
        index = bisect_right(self._starts, row) - 1
        return self._origins[index].place(row - self._starts[index])


class Reading:
    """The rows of one kind, on their way from the sources to a spool.

    Args:
        template: how conversations become text; called when there is one.
    """

    def __init__(
        self,
        kind: str,
        config: PipelineConfig,
        folder: Path,
        template: Callable[[], chat.Template],
        quarantine: Quarantine | None = None,
    ) -> None:
        self.kind, self.where, self.places = kind, f"data.{kind}", Places()
        self._config, self._folder = config, folder
        self._maker = Maker(kind, config.data, template)
        self._computed = ComputedColumns(config.data.computed)
        self._types: dict[str, pa.DataType] = {}
        self._columns: dict[str, str] = {}  # of the first file: name -> its path
        self.bad = BadRows(self.where, quarantine=quarantine)
        self._bad_in_parts = 0
        self.texts: list[str] = []
        self.stated: list[tuple[Any, Any]] = []  # points and splits of rows whose source says its split, (N,) each

    @property
    def count(self) -> int:
        """How many rows came in, those included that could not be read."""
        return self.places.count + self.bad.skipped.total() - self._bad_in_parts

    def read(self) -> Spool:
        """All rows.

        Raises:
            DataError: a source cannot be read, lacks a column, or has a bad row.
            ConfigError: the settings of ``data`` do not fit the files.
        """
        data = self._config.data
        named = sources(getattr(data, self.kind), self.where)
        size = sum(_bytes(source) for source in named)
        spool = Spool(self._folder, size, self.where, self.places.place)
        for source in named:
            self._read_one(_read_source(source, self.where, self.bad, data.encoding), source, spool)
        if written := list(_read_rows(data, self.kind)):
            self._read_one(written, None, spool)
        self.bad.check(ADVICE)
        spool.schema = self._schema(named)
        return spool

    def _read_one(self, parts: Iterable[Part], source: Source | None, spool: Spool) -> None:
        """The rows of one file."""
        roles: Roles | None = None
        names: dict[str, None] = {}
        cells: dict[str, CellType] = {}
        before, bad_before = self.places.count, self.bad.count + self.bad.skipped.total()
        for part in parts:
            if roles is None and part.names:
                roles = roles_of(self.kind, part, self._computed.names, self._config)
                there = [*part.names, *(name for name in self._computed.names if name not in part.names)]
                check_names(there, roles.columns, part.origin.path, self.where)
            names |= dict.fromkeys(part.names)
            if roles is not None and len(part.origin.numbers):
                self._add(part, roles, cells, source.split if source else None, spool)
        if self.places.count == before and self.bad.count + self.bad.skipped.total() == bad_before:
            raise DataError(f"{self.where}: {_shown(source)} has no rows; give it some, or leave it out")
        self._same_columns(list(names), _shown(source))
        for name, cell in cells.items():
            self._unify(name, cell.type, _shown(source))

    def _add(self, part: Part, roles: Roles, cells: dict[str, CellType], split: str | None, spool: Spool) -> None:
        """Check rows, make their texts, and spool them."""
        start, bad = self.places.add(part.origin), dict[int, BadRow]()
        count = len(part.origin.numbers)
        values = {column.name: part.values(column.name, count) for column in roles.columns}
        for column in roles.columns:
            if column.name not in self._computed.names:
                values[column.name] = _checked(values[column.name], column, part.cells, bad)
        extra = self._computed.columns(part, [row for row in range(count) if row not in bad], bad, self.where)
        values |= extra
        for column in roles.columns:
            if column.name in extra:
                _checked(extra[column.name], column, False, bad)
        texts: dict[int, Texts] = {}
        for row in range(count):
            if row not in bad:
                try:
                    texts[row] = self._maker.texts({name: column[row] for name, column in values.items()}, roles)
                except InputError:
                    raise
                except ValueError as error:
                    bad[row] = BadRow("", Problem("bad", str(error)))
        self._put_aside(part, bad)
        if texts:
            spool.add(self._table(part, roles, list(texts.values()), list(texts), extra, start, split, cells))

    def _put_aside(self, part: Part, bad: Mapping[int, BadRow]) -> None:
        """Count bad rows, and keep them if they are skipped."""
        self._bad_in_parts += len(bad)
        skips = self._config.data.bad_rows == "skip"
        columns = {name: part.values(name) for name in part.names} if bad and skips else {}
        for row in sorted(bad):
            column, problem = bad[row]
            whole = {name: values[row] for name, values in columns.items()}
            where = part.origin.place(row) + (f", {column}" if column else "")
            self.bad.add(where, problem.words, reason=problem.reason, row=whole)

    def _table(
        self,
        part: Part,
        roles: Roles,
        texts: list[Texts],
        rows: list[int],
        extra: dict[str, list[Any]],
        start: int,
        split: str | None,
        cells: dict[str, CellType],
    ) -> pa.Table:
        """The rows as they are spooled: internal columns, texts, and what comes along."""
        self.texts = list(dict.fromkeys([*self.texts, *texts[0]]))
        keys = self._keys(texts)
        splits = np.full(len(rows), -1 if split is None else SPLITS.index(split), np.int8)
        if split is not None:
            self.stated.append((keys.points, splits))
        made: dict[str, Any] = {
            KEY: key_array(keys.keys),
            POINT: pa.array(keys.points),
            ROW: pa.array([start + index for index in rows], pa.int64()),
            SPLIT: pa.array(splits),
        }
        for name in texts[0]:
            made[name] = pa.array([text[name] for text in texts], TYPES.get(name, pa.string()))
        with_extra = Part({name: extra.get(name) or part.columns[name] for name in [*part.names, *extra]}, part.origin)
        for name in with_extra.names:
            if name in made or name in roles.of.values() or name == self._prompt_column:
                continue
            if name in MEANT.get(self.kind, ()):
                continue
            if name in extra or not part.cells:
                source = with_extra if name in extra else part
                made[name] = typed(source, name, rows, self._types.get(name), self.where)
                self._types[name] = one_type(self._types.get(name), made[name].type)
            else:
                made[name] = typed(part, name, rows, pa.string(), self.where)
                cells.setdefault(name, CellType()).see(made[name].to_pylist())
        return pa.table(made)

    @cached_property
    def _prompt_column(self) -> str | None:
        """The column that is the prompt or a part of it, and does not come along under its own name."""
        return self._config.data.columns.prompt if self.kind != "labelled" and "prompt" in self._maker.fields else None

    def _keys(self, texts: Sequence[Texts]) -> Any:
        match self.kind:
            case "prompts":
                return keys_of([text["prompt"] for text in texts], [()] * len(texts))
            case "labelled":
                return keys_of([text["text"] for text in texts], [(str(text["preferred"]),) for text in texts])
        others = [
            [_as_text(value) for name, value in text.items() if name not in ("prompt", "margin")] for text in texts
        ]
        return keys_of([text["prompt"] for text in texts], others)

    def _unify(self, name: str, kind: pa.DataType, path: str) -> None:
        try:
            self._types[name] = one_type(self._types.get(name), kind)
        except pa.ArrowException as error:
            first = self._columns.get(name, path)
            raise DataError(
                f"{self.where}: the columns of {first}, {path} cannot be stored, each as one type: {error}"
            ) from error

    def _same_columns(self, names: Sequence[str], path: str) -> None:
        """See that a file has the columns of the first one."""
        if not self._columns:
            self._columns = dict.fromkeys(names, path)
        odd = sorted(set(names) ^ self._columns.keys())
        if odd:
            first = next(iter(self._columns.values()))
            has, lacks = (path, first) if odd[0] in names else (first, path)
            raise DataError(
                f"{self.where}: {has} has a column {odd[0]!r} that {lacks} lacks; the files of one setting must have "
                "the same columns"
            )

    def _schema(self, named: Sequence[Source]) -> pa.Schema:
        """The final types of the spooled columns."""
        fields = [(KEY, pa.binary(56)), (POINT, pa.uint64()), (ROW, pa.int64()), (SPLIT, pa.int8())]
        fields += [(name, TYPES.get(name, pa.string())) for name in self.texts]
        fields += [(name, kind) for name, kind in self._types.items() if name not in self.texts]
        schema = pa.schema(fields)
        try:
            pq.write_table(schema.empty_table(), pa.BufferOutputStream())  # do all of its types exist in Parquet?
        except pa.ArrowException as error:
            paths = ", ".join(source.shown for source in named) or "data.rows"
            raise DataError(
                f"{self.where}: the columns of {paths} cannot be stored, each as one type: {error}"
            ) from error
        return schema


def _checked(values: list[Any], column: Column, cells: bool, bad: dict[int, BadRow]) -> list[Any]:
    """The values of a column, cells that hold numbers as numbers; what is wrong with a row is added to ``bad``."""
    for row, problem in problems_of(values, column, cells).items():
        bad.setdefault(row, BadRow(f"column {column.name!r}", problem))
    return converted(values, column) if cells else values


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _shown(source: Source | None) -> str:
    return source.shown if source is not None else "data.rows"


def _bytes(source: Source) -> int:
    """About how large the rows of a source are."""
    if not isinstance(source.place, Path):
        return 2**30
    files = [source.place] if source.place.is_file() else [file for file in source.place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) * (4 if source.place.suffix == ".parquet" else 1)


def _read_source(source: Source, where: str, bad: BadRows, encoding: str) -> Iterator[Part]:
    """The rows of a source, in parts.

    Raises:
        DataError: it cannot be read.
    """
    if isinstance(source.place, Path):
        yield from read_file(source.place, where, bad, encoding)
    else:
        yield from hub_parts(source.place, source.shown, where)


def _read_rows(data: Data, kind: str) -> Iterator[Part]:
    """The rows of ``data.rows`` that are of a kind."""
    rows = [(number, row) for number, row in enumerate(data.rows, start=1) if data.kind_of(row) == kind]
    if rows:
        names = dict.fromkeys(name for _, row in rows for name in row)
        columns = {name: [row.get(name) for _, row in rows] for name in names}
        yield Part(columns, Origin("data.rows", "row", [number for number, _ in rows]))
