"""Reads one data file: JSON, JSON Lines, CSV, Parquet, or a folder written by ``datasets.save_to_disk``."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.errors import DataError
from rlhf.explain import did_you_mean, show

SHOWN = 5  # bad rows that a message names; the others are counted
LONGEST_CELL = 2**31 - 1  # characters in a cell of a CSV file; Python's own limit is 128 KiB


class Origin(NamedTuple):
    """Where the rows of one file are: ``numbers`` are its lines or rows, counted from 1."""

    path: Path
    unit: Literal["line", "row"]
    numbers: Sequence[int]


class Part(NamedTuple):
    """What a file holds: a table, or a list of Python values for each column; and the place of each row."""

    columns: pa.Table | dict[str, list[Any]]
    origin: Origin

    @property
    def names(self) -> list[str]:
        return list(self.columns.column_names if isinstance(self.columns, pa.Table) else self.columns)


class BadRows:
    """Gathers what is wrong with rows, so that one message names several."""

    def __init__(self, where: str, what: str = "bad") -> None:
        self._title = where, what
        self._lines: list[str] = []
        self.count = 0

    def add(self, place: str, problem: str) -> None:
        self.count += 1
        if self.count <= SHOWN:
            self._lines.append(f"{place}: {problem}")

    def check(self, advice: str) -> None:
        """Raise unless no row was added.

        Raises:
            DataError: names the first rows, counts all, and ends with ``advice``.
        """
        if not self.count:
            return
        (where, what), rows = self._title, "row is" if self.count == 1 else "rows are"
        more = [f"... and {self.count - SHOWN} more"] if self.count > SHOWN else []
        lines = "\n  ".join([f"{where}: {self.count} {rows} {what}", *self._lines, *more])
        raise DataError(f"{lines}\n{advice}")


def read_file(path: Path, where: str, bad: BadRows) -> Part:
    """What a file holds, by the format that its suffix says. Rows that cannot be read are added to ``bad``.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    if path.is_dir():
        return _read_saved(path, where)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{where}: {path} is of an unknown format {path.suffix!r}; known: {', '.join(_READERS)}, and "
            f"folders written by datasets.save_to_disk{did_you_mean(path.suffix, _READERS)}"
        )
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{where}: {path} is empty; give it rows, or leave it out")
        return reader(path, where, bad)
    except UnicodeDecodeError:
        raise _not_utf8(path, where) from None
    except PermissionError as error:
        raise DataError(f"{where}: {path} may not be read: {error.strerror}") from error


def _not_utf8(path: Path, where: str) -> DataError:
    """What is wrong with a file that does not decode: the first bad byte."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                return DataError(f"{where}: {path} is UTF-16; save it as UTF-8")
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
                return DataError(f"{where}: {path} line {number}: {byte} is not UTF-8; save the file as UTF-8")
    raise AssertionError("all of it is UTF-8")


def _parse(text: str) -> Any:
    """JSON; ``ValueError`` where it is malformed or an object has a key twice."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} is given twice")
    return made


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON at column {error.colno}: {error.msg}"
    return f"not valid JSON: {error or 'nested too deeply'}"


def _by_column(records: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _read_jsonl(path: Path, where: str, bad: BadRows) -> Part:
    records, numbers = [], []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = _parse(line)
            except (ValueError, RecursionError) as error:
                if number == 1 and line.lstrip().startswith("["):
                    raise DataError(
                        f"{where}: {path} line 1 begins a JSON array, but each line must be an object; name "
                        f"the file {path.stem}.json"
                    ) from None
                bad.add(f"{path} line {number}", _json_problem(error))
                continue
            if isinstance(record, dict):
                records.append(record)
                numbers.append(number)
            else:
                bad.add(f"{path} line {number}", f'{show(record)} is not an object such as {{"prompt": ...}}')
    return Part(_by_column(records), Origin(path, "line", numbers))


def _read_json(path: Path, where: str, bad: BadRows) -> Part:
    try:
        records = _parse(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data" and error.lineno > 1
        hint = f"; if each line is an object, name it {path.stem}.jsonl" if lines else ""
        raise DataError(f"{where}: {path} line {error.lineno}: {_json_problem(error)}{hint}") from None
    except RecursionError as error:
        raise DataError(f"{where}: {path}: {_json_problem(error)}") from None
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise DataError(f"{where}: {path}: {_json_problem(error)}") from None
    if not isinstance(records, list):
        keys = f"an object with the keys {', '.join(map(repr, records))}" if isinstance(records, dict) else ""
        raise DataError(f"{where}: {path} holds {keys or show(records)}; must be an array of objects: [{{...}}, ...]")
    good = [index for index, record in enumerate(records) if isinstance(record, dict)]
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            bad.add(f"{path} row {index + 1}", f'{show(record)} is not an object such as {{"prompt": ...}}')
    return Part(_by_column([records[index] for index in good]), Origin(path, "row", [index + 1 for index in good]))


def _read_csv(path: Path, where: str, bad: BadRows) -> Part:
    cells: list[list[str]] = []
    numbers: list[int] = []
    with path.open(encoding="utf-8-sig", newline="") as file, _long_cells():
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            header = next(reader, [])
            line = reader.line_num + 1
            for row in reader:
                if len(row) == len(header):
                    cells.append(row)
                    numbers.append(line)
                elif row:
                    bad.add(
                        f"{path} line {line}",
                        f"has {len(row)} cells, the header {len(header)}; a text with a comma needs quotes",
                    )
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{where}: {path} line {line}: not valid CSV: {error}; write a quote within quotes as two"
            ) from None
    _check_header(path, header, where)
    columns: dict[str, list[Any]] = {name: [row[index] or None for row in cells] for index, name in enumerate(header)}
    return Part(columns, Origin(path, "line", numbers))


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


def _read_parquet(path: Path, where: str, bad: BadRows) -> Part:
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{where}: {path} is not a Parquet file, or it is damaged: {reason}") from error
    return _from_table(table, path)


def _read_saved(path: Path, where: str) -> Part:
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
        table = load_from_disk(str(path)).with_format("arrow")[:]
    except Exception as error:  # whatever its reader trips over
        raise DataError(f"{where}: {path} is damaged: {type(error).__name__}: {error}") from error
    return _from_table(table, path)


def _from_table(table: pa.Table, path: Path) -> Part:
    index = [name for name in table.column_names if name.startswith("__index_level_")]  # pandas' row labels
    table = table.drop_columns(index).replace_schema_metadata(None)
    return Part(table, Origin(path, "row", range(1, table.num_rows + 1)))


_READERS: dict[str, Callable[[Path, str, BadRows], Part]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".ndjson": _read_jsonl,
}
