"""Reads data files in parts: JSON, JSON Lines, CSV, Parquet, and folders written by ``datasets.save_to_disk``."""

from __future__ import annotations

import codecs
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.errors import DataError, did_you_mean, show
from rlhf.prepare.json_array import array_items
from rlhf.prepare.problems import BadRows
from rlhf.prepare.sources import HubDataset

if TYPE_CHECKING:
    from datasets import Dataset

LONGEST_CELL = 2**31 - 1  # characters in a cell of a CSV file; Python's own limit is 128 KiB
ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 8192, 2**24  # most of a part


class Origin(NamedTuple):
    """Where rows are: ``numbers`` are their lines or rows in a file or dataset, counted from 1."""

    path: str
    unit: Literal["line", "row"]
    numbers: Sequence[int]

    def place(self, index: int) -> str:
        """The place of a row for a message: ``my/file.jsonl line 17``."""
        return f"{self.path} {self.unit} {self.numbers[index]}"


class Part(NamedTuple):
    """Some rows of a file: a table, or a list of Python values for each column; and the place of each row.

    ``cells``: values are the texts of cells, which may be numbers.
    """

    columns: pa.Table | dict[str, list[Any]]
    origin: Origin
    cells: bool = False

    @property
    def names(self) -> list[str]:
        return list(self.columns.column_names if isinstance(self.columns, pa.Table) else self.columns)

    def values(self, name: str, count: int = 0) -> list[Any]:
        """The Python values of a column; so many nulls where these rows lack it."""
        if name not in self.names:
            return [None] * count
        column = self.columns[name]
        found: list[Any] = column if isinstance(column, list) else column.to_pylist()
        return found


class _Records:
    """Gathers rows until they make a part."""

    def __init__(self, path: Path, unit: Literal["line", "row"]) -> None:
        self._path, self._unit = str(path), unit
        self._clear()

    def add(self, record: dict[str, Any], number: int, characters: int) -> bool:
        """Add a row; whether a part is full."""
        self._rows.append(record)
        self._numbers.append(number)
        self._characters += characters
        return len(self._rows) >= ROWS_AT_ONCE or self._characters >= CHARACTERS_AT_ONCE

    def part(self) -> Part:
        """The rows so far, and begin anew."""
        names = dict.fromkeys(name for record in self._rows for name in record)
        columns = {name: [record.get(name) for record in self._rows] for name in names}
        made = Part(columns, Origin(self._path, self._unit, self._numbers))
        self._clear()
        return made

    def _clear(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._numbers: list[int] = []
        self._characters = 0


def read_file(path: Path, where: str, bad: BadRows, encoding: str = "utf-8") -> Iterator[Part]:
    """What a file holds, by the format that its suffix says. Rows that cannot be read are added to ``bad``.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    if path.is_dir():
        yield from _read_saved(path, where)
        return
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{where}: {path} is of an unknown format {path.suffix!r}; known: {', '.join(_READERS)}, and "
            f"folders written by datasets.save_to_disk{did_you_mean(path.suffix, _READERS)}"
        )
    if codecs.lookup(encoding).name == "utf-8":
        encoding = "utf-8-sig"  # with or without a byte order mark
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{where}: {path} is empty; give it rows, or leave it out")
        yield from reader(path, where, bad, encoding)
    except UnicodeError:
        raise _undecodable(path, where, encoding) from None
    except PermissionError as error:
        raise DataError(f"{where}: {path} may not be read: {error.strerror}") from error


def _undecodable(path: Path, where: str, encoding: str) -> DataError:
    """What is wrong with a file that does not decode."""
    if encoding != "utf-8-sig":
        return DataError(f"{where}: {path} is not {encoding}; set data.encoding to what it is, or save it as UTF-8")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                return DataError(f"{where}: {path} is UTF-16; save it as UTF-8, or set data.encoding: utf-16")
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
                return DataError(
                    f"{where}: {path} line {number}: {byte} is not UTF-8; save the file as UTF-8, or set data.encoding"
                )
    raise AssertionError("all of it is UTF-8")


def parse(text: str) -> Any:
    """JSON; ``ValueError`` where it is malformed or an object has a key twice."""
    return json.loads(text, object_pairs_hook=unique_keys)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dictionary of a JSON object's pairs; ``ValueError`` where a key is given twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} is given twice")
    return made


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON at column {error.colno}: {error.msg}"
    return f"not valid JSON: {error or 'nested too deeply'}"


def _not_an_object(value: Any) -> str:
    return f'{show(value)} is not an object such as {{"prompt": ...}}'


def _read_jsonl(path: Path, where: str, bad: BadRows, encoding: str) -> Iterator[Part]:
    records = _Records(path, "line")
    with path.open(encoding=encoding) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = parse(line)
            except (ValueError, RecursionError) as error:
                if number == 1 and line.lstrip().startswith("["):
                    raise DataError(
                        f"{where}: {path} line 1 begins a JSON array, but each line must be an object; name "
                        f"the file {path.stem}.json"
                    ) from None
                bad.add(f"{path} line {number}", _json_problem(error), row=line.rstrip("\n"))
                continue
            if not isinstance(record, dict):
                bad.add(f"{path} line {number}", _not_an_object(record), row=record)
            elif records.add(record, number, len(line)):
                yield records.part()
    yield records.part()


def _read_json(path: Path, where: str, bad: BadRows, encoding: str) -> Iterator[Part]:
    records, row = _Records(path, "row"), 0
    with path.open(encoding=encoding) as file:
        try:
            for row, (record, characters) in enumerate(array_items(file, unique_keys), start=1):
                if not isinstance(record, dict):
                    bad.add(f"{path} row {row}", _not_an_object(record), row=record)
                elif records.add(record, row, characters):
                    yield records.part()
        except json.JSONDecodeError as error:
            lines = error.msg == "Extra data" and error.lineno > 1
            hint = f"; if each line is an object, name it {path.stem}.jsonl" if lines else ""
            raise DataError(f"{where}: {path} line {error.lineno}: {_json_problem(error)}{hint}") from None
        except UnicodeDecodeError:
            raise
        except TypeError as error:  # another value than an array
            value = error.args[0]
            keys = f"an object with the keys {', '.join(map(repr, value))}" if isinstance(value, dict) else show(value)
            raise DataError(f"{where}: {path} holds {keys}; must be an array of objects: [{{...}}, ...]") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: {path} row {row + 1}: {_json_problem(error)}") from None
    yield records.part()


def _read_csv(path: Path, where: str, bad: BadRows, encoding: str) -> Iterator[Part]:
    cells: list[list[str]] = []
    numbers: list[int] = []
    characters = 0

    def part() -> Part:
        columns = {name: [row[index] or None for row in cells] for index, name in enumerate(header)}
        made = Part(columns, Origin(str(path), "line", numbers), cells=True)
        return made

    with path.open(encoding=encoding, newline="") as file, _long_cells():
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            header = next(reader, [])
            _check_header(path, header, where)
            line = reader.line_num + 1
            for row in reader:
                if len(row) == len(header):
                    cells.append(row)
                    numbers.append(line)
                    characters += sum(map(len, row))
                    if len(cells) >= ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
                        yield part()
                        cells, numbers, characters = [], [], 0
                elif row:
                    wrong = f"has {len(row)} cells, the header {len(header)}; a text with a comma needs quotes"
                    bad.add(f"{path} line {line}", wrong, row=row)
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{where}: {path} line {line}: not valid CSV: {error}; write a quote within quotes as two"
            ) from None
        yield part()


def _check_header(path: Path, header: Sequence[str], where: str) -> None:
    for index, name in enumerate(header):
        if not name.strip():
            raise DataError(f"{where}: {path} line 1: column {index + 1} has no name; give it one")
        if name in header[:index]:
            raise DataError(f"{where}: {path} line 1: two columns are named {name!r}; rename one")


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path, where: str, bad: BadRows, encoding: str) -> Iterator[Part]:
    try:
        with pq.ParquetFile(path) as file:
            start, meta = 1, file.metadata
            size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            rows = max(1, min(ROWS_AT_ONCE, CHARACTERS_AT_ONCE * meta.num_rows // max(size, 1)))
            yield _table_part(file.schema_arrow.empty_table(), str(path), 1)  # its columns, even without a row
            for batch in file.iter_batches(rows):
                table = pa.Table.from_batches([batch])
                table.validate(full=True)
                yield _table_part(table, str(path), start)
                start += table.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{where}: {path} is not a Parquet file, or it is damaged: {reason}") from error


def _read_saved(path: Path, where: str) -> Iterator[Part]:
    """A folder written by ``datasets.save_to_disk``."""
    if (path / "dataset_dict.json").is_file():
        splits = [str(entry) for entry in sorted(path.iterdir()) if entry.is_dir()]
        raise DataError(f"{where}: {path} holds several splits; name one: {', '.join(splits)}")
    if not (path / "dataset_info.json").is_file():
        raise DataError(
            f"{where}: {path} is a folder, and not one written by datasets.save_to_disk; name a file "
            f"in it, or a pattern such as {path}/*.jsonl"
        )
    from datasets import load_from_disk

    try:
        yield from dataset_parts(load_from_disk(str(path)), str(path))
    except DataError:
        raise
    except Exception as error:  # whatever its reader trips over
        raise DataError(f"{where}: {path} is damaged: {type(error).__name__}: {error}") from error


def hub_parts(dataset: HubDataset, name: str, where: str) -> Iterator[Part]:
    """The rows of one split of a dataset of the hub, which is fetched into the cache first.

    Raises:
        DataError: it cannot be had, or has no such configuration or split.
    """
    import datasets

    from rlhf.store.hub import resolve_commit

    commit = resolve_commit(dataset.name, dataset.revision, where, "dataset")
    try:
        loaded = datasets.load_dataset(dataset.name, dataset.config, split=dataset.split, revision=commit)
    except Exception as error:  # a missing split or configuration, a format that it does not read, the network
        reason = str(error).partition("\n")[0]
        raise DataError(f"{where}: {name}, config {dataset.config}: {type(error).__name__}: {reason}") from error
    yield from dataset_parts(loaded, name)


def dataset_parts(dataset: Dataset, name: str) -> Iterator[Part]:
    """The rows of a dataset, which lies memory-mapped on the disk."""
    rows = max(1, min(ROWS_AT_ONCE, CHARACTERS_AT_ONCE * len(dataset) // max(dataset.data.nbytes, 1)))
    start = 1
    for table in dataset.with_format("arrow").iter(batch_size=rows):
        yield _table_part(table, name, start)
        start += table.num_rows


def _table_part(table: pa.Table, name: str, start: int) -> Part:
    index = [column for column in table.column_names if column.startswith("__index_level_")]  # pandas' row labels
    table = table.drop_columns(index).replace_schema_metadata(None)
    return Part(table, Origin(name, "row", range(start, start + table.num_rows)))


_READERS: Mapping[str, Callable[[Path, str, BadRows, str], Iterator[Part]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".ndjson": _read_jsonl,
}
