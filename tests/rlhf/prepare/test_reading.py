"""Reading data files: every format gives the same rows, and each row knows its place."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import DataError
from rlhf.prepare.chat import simple_template
from rlhf.prepare.formats import ROWS_AT_ONCE
from rlhf.prepare.problems import SHOWN, BadRows
from rlhf.prepare.reading import Reading
from rlhf.prepare.spool import INTERNAL, ROW

RECORDS: list[dict[str, Any]] = [
    {"prompt": "Grüße,\n", "response": 'He said "hi"', "n": 1, "x": 0.5},
    {"prompt": "second \u2028 line", "response": " padded ", "n": 2, "x": None},
    {"prompt": "日本語", "response": "🙂", "n": 3, "x": 2.0},
]


class Rows:
    """What a reading makes of files, in the order of the input."""

    def __init__(
        self, *paths: Path | str, kind: str = "demonstrations", judge: dict[str, Any] | str = "off", **data: Any
    ) -> None:
        off = dict.fromkeys(("sft", "reward", "ppo", "evaluate"), "off")
        files = {kind: [str(path) for path in paths]}
        config = PipelineConfig.model_validate(
            {**off, "judge": judge, "data": files | data, "model": {"init": "random"}}
        )
        with tempfile.TemporaryDirectory() as folder:
            reading = Reading(kind, config, Path(folder) / "spool", lambda: simple_template)
            parts = list(reading.read().tables())
        self.places = reading.places
        table = pa.concat_tables(parts).sort_by(ROW)
        self.table = table.drop_columns(list(INTERNAL))

    def place(self, row: int) -> str:
        return self.places.place(row)


def read(*paths: Path | str, **data: Any) -> Rows:
    return Rows(*paths, **data)


def error_of(*paths: Path | str, **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(*paths, **data)
    return str(caught.value)


def write(folder: Path, name: str, records: list[dict[str, Any]] = RECORDS) -> Path:
    path = folder / name
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(records, ensure_ascii=False, indent=1), "utf-8")
        case ".jsonl" | ".ndjson":
            path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
        case ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(records[0]))
                writer.writeheader()
                writer.writerows(records)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(records), path)
        case _:
            from datasets import Dataset

            Dataset.from_list(records).save_to_disk(str(path))
    return path


FORMATS = ["a.json", "a.jsonl", "a.ndjson", "a.csv", "a.parquet", "A.JSONL", "saved"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl").rename(tmp_path / name) if name == "A.JSONL" else write(tmp_path, name)
    rows = read(path)
    assert rows.table.to_pylist() == RECORDS
    assert [rows.table.schema.field(text).type for text in ("prompt", "response")] == [pa.string()] * 2


def test_places(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('\n{"prompt": "a", "response": "b"}\n\n{"prompt": "c", "response": "d"}\n')
    cells = tmp_path / "b.csv"
    cells.write_text('prompt,response\n"two\nlines",x\n\nlast,y\n')
    table = write(tmp_path, "c.json", [{"prompt": "e", "response": "f"}])
    rows = read(lines, cells, table)
    places = ["a.jsonl line 2", "a.jsonl line 4", "b.csv line 2", "b.csv line 5", "c.json row 1"]
    assert [rows.place(row) for row in range(5)] == [f"{tmp_path}/{place}" for place in places]


def test_patterns_in_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path, f"{name}.jsonl", [{"prompt": name, "response": name}])
    assert read(tmp_path / "*.jsonl").table["prompt"].to_pylist() == ["a", "b", "c"]


def test_file_in_two_patterns(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl")
    assert "a.jsonl is named 2 times" in error_of(tmp_path / "*.jsonl", tmp_path / "a.*")


def test_byte_order_mark(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl", "a.csv"):
        path = write(tmp_path, name)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert read(path).table.column_names == ["prompt", "response", "n", "x"]


def test_windows_line_ends(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv"):
        path = write(tmp_path, name, [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}])
        path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
        rows = read(path)
        assert rows.table["response"].to_pylist() == ["b", "d"]


def test_numbers_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,response,whole,real,code,some,none\n1,2,-30,1,007,,\n3,4,5,2.5e1,12,6,\n")
    table = read(path).table
    assert table.drop_columns(["prompt", "response"]).to_pylist() == [
        {"whole": -30, "real": 1.0, "code": "007", "some": None, "none": None},
        {"whole": 5, "real": 25.0, "code": "12", "some": 6, "none": None},
    ]
    assert table["prompt"].to_pylist() == ["1", "3"]  # a text column stays text


def test_whole_numbers_in_csv_keep_their_digits(tmp_path: Path) -> None:
    """Up to the limits of int64 they are numbers; beyond, or beside a fraction that makes them doubles, text."""
    most, least = 2**63 - 1, -(2**63)
    path = tmp_path / "a.csv"
    path.write_text(
        f"prompt,response,whole,beyond,mixed,fits\n1,2,{most},{most + 1},{2**53 + 1},{2**53}\n"
        f"3,4,{least},{least - 1},0.5,0.5\n"
    )
    assert read(path).table.drop_columns(["prompt", "response"]).to_pylist() == [
        {"whole": most, "beyond": str(most + 1), "mixed": str(2**53 + 1), "fits": float(2**53)},
        {"whole": least, "beyond": str(least - 1), "mixed": "0.5", "fits": 0.5},
    ]


@pytest.mark.parametrize("name", ["b.jsonl", "b.csv"])
def test_whole_numbers_that_fractions_of_another_file_would_round(name: str, tmp_path: Path) -> None:
    one = write(tmp_path, "a.jsonl", [{"prompt": "a", "response": "b", "n": n} for n in (0.5, 1.5)])
    two = write(tmp_path, name, [{"prompt": f"c{n}", "response": "d", "n": n} for n in (1, 2, 2**53 + 1, 4)])
    expected = f"data.demonstrations: {two} line {4 if name == 'b.csv' else 3}, column 'n': {2**53 + 1}"
    message = error_of(one, two).replace(repr(str(2**53 + 1)), str(2**53 + 1))  # a cell is text
    assert message.startswith(expected)
    assert "give all rows one type" in message
    assert error_of(two, one)


def test_whole_numbers_that_fractions_of_a_later_part_would_round(tmp_path: Path) -> None:
    numbers = [2**53 + 1, *range(ROWS_AT_ONCE), 0.5]
    path = write(tmp_path, "a.jsonl", [{"prompt": str(n), "response": "b", "n": n} for n in numbers])
    assert f"{path} line 1, column 'n': {2**53 + 1} is not of the type of other rows, double" in error_of(path)


def test_long_cells_in_csv(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = write(tmp_path, "a.csv", [{"prompt": "x" * 200_000, "response": "y"}])
    assert len(read(path).table["prompt"][0].as_py()) == 200_000
    assert csv.field_size_limit() == before


def test_parquet_types_of_text(tmp_path: Path) -> None:
    texts = ["a", "b", "a"]
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        columns = {"prompt": pa.array(texts).cast(kind), "response": texts, "__index_level_0__": [0, 1, 2]}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        table = read(tmp_path / "a.parquet").table
        assert table.schema.names == ["prompt", "response"]
        assert table["prompt"].to_pylist() == texts
        assert table.schema.field("prompt").type == pa.string()


def test_a_folder_name_is_not_a_column(tmp_path: Path) -> None:
    (tmp_path / "year=2024").mkdir()
    assert read(write(tmp_path / "year=2024", "a.parquet")).table.column_names == ["prompt", "response", "n", "x"]


def test_types_of_several_files(tmp_path: Path) -> None:
    one = write(tmp_path, "one.jsonl", [{"prompt": "a", "response": "b", "n": 1, "m": None}])
    two = write(tmp_path, "two.csv", [{"m": "z", "n": 2.5, "response": "d", "prompt": "c"}])
    assert read(one, two).table.to_pylist() == [
        {"prompt": "a", "response": "b", "n": 1.0, "m": None},
        {"prompt": "c", "response": "d", "n": 2.5, "m": "z"},
    ]


def test_nested_columns_come_along(tmp_path: Path) -> None:
    records = [{"prompt": "a", "response": "b", "meta": {"tags": ["x"], "n": 1}}]
    assert read(write(tmp_path, "a.jsonl", records)).table.to_pylist() == records


def test_many_bad_rows(tmp_path: Path) -> None:
    one = write(tmp_path, "one.jsonl", [{"prompt": "a", "response": None}] * 4 + [{"prompt": "a", "response": "b"}])
    two = write(tmp_path, "two.jsonl", [{"prompt": 7, "response": "c"}] * 3)
    message = error_of(one, two)
    assert message.startswith("data.demonstrations: 7 rows are bad\n")
    assert message.count("one.jsonl line") == 4
    assert f"{two} line 1, column 'prompt': 7 is not text" in message
    assert "... and 2 more" in message
    assert len(message.splitlines()) == SHOWN + 3


def test_the_first_value_of_another_type(tmp_path: Path) -> None:
    records = [{"prompt": "a", "response": "b", "n": n} for n in (1, 2, 3, "four", 5, "six")]
    assert "a.jsonl line 4, column 'n': 'four' is not of the type" in error_of(write(tmp_path, "a.jsonl", records))
    records[3]["n"], records[5]["n"] = 2**70, 6
    assert f"a.json row 4, column 'n': {2**70}" in error_of(write(tmp_path, "a.json", records))


def test_long_values_are_shortened(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(["word"] * 1000) + "\n")
    assert max(map(len, error_of(path).splitlines())) < 200 + len(str(path))


def test_optional_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl")
    assert read(path, kind="prompts").table.num_rows == 3
    assert "column 'n': 1 is not text" in error_of(path, kind="prompts", columns={"reference": "n"})


def test_verdicts(tmp_path: Path) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    settings: dict[str, Any] = {"kind": "preferences", "judge": {"annotators": ["v"]}}
    read(write(tmp_path, "a.jsonl", [{**pair, "v": v} for v in ("chosen", "rejected", None)]), **settings)
    read(write(tmp_path, "b.csv", [{**pair, "v": v} for v in ("chosen", "")]), **settings)
    message = error_of(write(tmp_path, "c.jsonl", [{**pair, "v": v} for v in ("Chosen", 1, ["chosen"])]), **settings)
    assert message.startswith("data.preferences: 3 rows are bad")
    assert "line 1, column 'v': 'Chosen' is not a verdict" in message


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "nul", '{"a": 1}}', "{'a': 1}"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_malformed_json(content: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert str(path) in error_of(path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.jsonl")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert error_of(path) == f"data.demonstrations: {path} may not be read: Permission denied"


def test_bad_rows_without_any() -> None:
    bad = BadRows("data.prompts")
    bad.check("nothing")  # raises nothing
    assert bad.count == 0


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "cp1252", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_other_encodings(name: str, encoding: str, tmp_path: Path) -> None:
    records = [{"prompt": "Grüße", "response": 'said "é",\nand ended'}, {"prompt": "ñ", "response": "x\r\ny"}]
    path = write(tmp_path, name, records)
    path.write_bytes(path.read_bytes().decode("utf-8").encode(encoding))
    assert read(path, encoding=encoding).table.to_pylist() == records


@pytest.mark.parametrize("encoding", ["ascii", "utf-16"])
def test_the_wrong_encoding_is_said(encoding: str, tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", RECORDS)
    assert f"{path} is not {encoding}; set data.encoding to what it is" in error_of(path, encoding=encoding)
