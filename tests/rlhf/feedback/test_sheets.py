"""Blind sheets: they say nothing of whose a response is, and come back from spreadsheet programs unharmed."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st

from rlhf.errors import ArtifactError, ConfigError, DataError, NotCachedError
from rlhf.feedback import sheets, verdicts
from rlhf.feedback.sheets import COLUMNS, Sheet, guarded, unguarded
from rlhf.runs.records import RunRecord
from rlhf.store.artifacts import Store
from tests.rlhf.made_runs import make_run, samples

PROMPTS = [f"prompt {number}" for number in range(40)]
ODD = ["=1+1", "+3", "-4", "@SUM(A1)", "'quoted", "\ttab", "007", "1.50", 'a;b,c\n"d"', "ß 東京 🙂", ""]
TEXTS = {
    "sft": [*(f"{odd}" for odd in ODD), *(f"sft {number}" for number in range(25)), *["the same"] * 4],
    "ppo": [*(f"{odd} more" for odd in ODD), *(f"ppo {number}" for number in range(25)), *["the  same\n"] * 4],
}
REWARD = {"sft_reward": [0.0] * 40, "ppo_reward": [1.0] * 40}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def run(home: Path) -> RunRecord:
    return make_run(home, "20260101-000000-aaaaaa", samples(PROMPTS, REWARD, TEXTS))


@pytest.fixture
def sheet(run: RunRecord, home: Path) -> Sheet:
    return sheets.make(run, Store(home))


def opinions(sheet: Sheet, verdict: Callable[[sheets.Row], str]) -> list[dict[str, str]]:
    """The lines of a sheet, filled in."""
    lines = [dict(zip(COLUMNS, line, strict=True)) for line in zip(*sheet.columns.values(), strict=True)]
    return [line | {"verdict": verdict(row)} for line, row in zip(lines, sheet.key.rows, strict=True)]


def candidate(row: sheets.Row) -> str:
    """The verdict of someone who always prefers the candidate."""
    return "A" if row.a == "candidate" else "B"


def save(path: Path, lines: list[dict[str, str]], delimiter: str = ",", encoding: str = "utf-8-sig") -> Path:
    """As a spreadsheet program would, from the cells that it read."""
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows({name: guarded(cell) for name, cell in line.items()} for line in lines)
    return path


def test_a_sheet_has_both_texts_and_not_whose_they_are(sheet: Sheet) -> None:
    assert tuple(sheet.columns) == COLUMNS
    for row, prompt, a, b in zip(sheet.key.rows, *(sheet.columns[name] for name in ("prompt", "A", "B")), strict=True):
        ours, theirs = TEXTS["ppo"][row.prompt_row], TEXTS["sft"][row.prompt_row]
        assert prompt == PROMPTS[row.prompt_row]
        assert (a, b) == ((ours, theirs) if row.a == "candidate" else (theirs, ours))
    assert set(sheet.columns["verdict"]) == {""}
    sides = Counter(row.a for row in sheet.key.rows)
    assert min(sides.values()) > 8  # of 36
    assert sheet.key.identical == (36, 37, 38, 39)
    assert not any("candidate" in name or "ppo" in name for name in sheet.columns["id"])


def test_the_same_arguments_give_the_same_sheet_and_others_another(run: RunRecord, home: Path, sheet: Sheet) -> None:
    store = Store(home)
    assert sheets.make(run, store) == sheet
    other = sheets.make(run, store, seed=1)
    assert other.key.sheet != sheet.key.sheet
    assert [row.prompt_row for row in other.key.rows] != [row.prompt_row for row in sheet.key.rows]
    fewer = sheets.make(run, store, rows=10)
    assert len(fewer.key.rows) + len(fewer.key.identical) == 10


def test_policies_are_chosen(run: RunRecord, home: Path) -> None:
    store = Store(home)
    against = sheets.make(run, store, "ppo,reference").key
    assert (against.candidate, against.baseline) == ("ppo", "reference")
    assert against.rows[0].scores == {}  # a score of both is needed
    for wrong in ("ppo", "ppo,ppo", "ppo,base", "ppo,sft,reference"):
        with pytest.raises(ConfigError, match=f"--policies {wrong}: expected two of sft, ppo, reference"):
            sheets.make(run, store, wrong)


def test_of_several_references_the_first_and_no_row_without_one(home: Path) -> None:
    references = [["first", "second"], [], *[["same"]] * 38]
    made = make_run(home, "1", samples(PROMPTS, {}, {"reference": references, "ppo": ["same"] * 40}))
    sheet = sheets.make(made, Store(home), "ppo,reference")
    assert sorted([sheet.columns["A"][0], sheet.columns["B"][0]]) == ["first", "same"]
    assert (len(sheet.key.rows), len(sheet.key.identical)) == (1, 38)


def test_a_run_that_has_nothing_to_judge(home: Path, run: RunRecord) -> None:
    same = make_run(home, "1", samples(PROMPTS, {}, {"sft": ["x"] * 40, "ppo": ["x"] * 40}), config={"seed": 2},
                    ingredients={"evaluate": {"x": 1}})  # fmt: skip
    with pytest.raises(ConfigError, match="ppo and sft never differ in 40 answers"):
        sheets.make(same, Store(home))
    del run.stages["evaluate"]
    with pytest.raises(NotCachedError, match="has no evaluation"):
        sheets.make(run, Store(home))


@given(st.text())
def test_guarding_is_reversible_and_no_formula_is_left(cell: str) -> None:
    assert unguarded(guarded(cell)) == cell
    assert not guarded(cell).startswith(("=", "+", "-", "@", "\t", "\r", "\n"))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_what_is_written_comes_back(sheet: Sheet, home: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"sheet.{ending}"
    key = sheets.write(sheet, out, home)
    assert key == home / "sheets" / f"{sheet.key.sheet}.json"
    if ending == "csv":
        assert out.read_bytes().startswith(b"\xef\xbb\xbfid,prompt,A,B,verdict,comment\r\n")
        with out.open(encoding="utf-8-sig", newline="") as file:
            lines = [{name: unguarded(cell) for name, cell in line.items()} for line in csv.DictReader(file)]
        save(out, [line | {"verdict": "A"} for line in lines])
    else:
        lines = pq.read_table(out).to_pylist()
        pq.write_table(pa.Table.from_pylist([line | {"verdict": "A", "comment": None} for line in lines]), out)
    assert [line["A"] for line in lines] == sheet.columns["A"]
    read, found = verdicts.read(out, home)
    assert read == sheet.key
    assert found == {row.prompt_row: row.a for row in sheet.key.rows}


def test_a_file_that_may_hold_verdicts_is_not_overwritten(sheet: Sheet, home: Path, tmp_path: Path) -> None:
    sheets.write(sheet, tmp_path / "sheet.csv", home)
    with pytest.raises(ConfigError, match="is there already, and may hold verdicts"):
        sheets.write(sheet, tmp_path / "sheet.csv", home)
    with pytest.raises(ConfigError, match=r"a sheet is a \.csv or a \.parquet file"):
        sheets.write(sheet, tmp_path / "sheet.xlsx", home)


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-16"), (";", "utf-16-le")]
)
def test_what_spreadsheet_programs_make_of_it(
    sheet: Sheet, home: Path, tmp_path: Path, delimiter: str, encoding: str
) -> None:
    """Other separators and encodings, other white space, rows sorted and missing, a column more, verdicts as typed."""
    sheets.write(sheet, tmp_path / "sheet.csv", home)
    lines = opinions(sheet, candidate)
    for line, typed in zip(lines, (" a ", "b", "TIE", "Tie ", ""), strict=False):
        line["verdict"] = typed
    lines = [
        {name.upper(): cell.replace("\n", "\r\n") for name, cell in line.items()} | {"mine": "x"} for line in lines
    ]
    lines = sorted(lines[:20], key=lambda line: line["PROMPT"], reverse=True)
    came = save(tmp_path / "came.csv", lines, delimiter, encoding)
    if encoding == "utf-16-le":
        came.write_bytes(b"\xff\xfe" + f"sep={delimiter}\r\n".encode("utf-16-le") + came.read_bytes())
    _, found = verdicts.read(came, home)
    rows = sheet.key.rows
    other = {"candidate": "baseline", "baseline": "candidate"}
    expected = {rows[0].prompt_row: rows[0].a, rows[1].prompt_row: other[rows[1].a]}
    expected |= dict.fromkeys((rows[2].prompt_row, rows[3].prompt_row), "tie")
    expected |= {row.prompt_row: "candidate" for row in rows[5:20]}
    assert found == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "C"}, "row 4: verdict 'C'; allowed are A, B, tie, or nothing"),
        ({"id": "0000-1"}, "row 4: id '0000-1' is not in sheet"),
        ({"A": "something else"}, "row 4: the prompt or a response of '.*-0003' is not what the sheet showed"),
        ({"prompt": ""}, "row 4: the prompt or a response"),
    ],
)
def test_a_wrong_row_is_refused_with_its_number(
    sheet: Sheet, home: Path, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    sheets.write(sheet, tmp_path / "sheet.csv", home)
    lines = opinions(sheet, candidate)
    lines[2] |= change
    with pytest.raises(DataError, match=message):
        verdicts.read(save(tmp_path / "came.csv", lines), home)


def test_texts_on_swapped_sides_are_refused(sheet: Sheet, home: Path, tmp_path: Path) -> None:
    sheets.write(sheet, tmp_path / "sheet.csv", home)
    lines = opinions(sheet, candidate)
    lines[0] |= {"A": lines[0]["B"], "B": lines[0]["A"]}
    with pytest.raises(DataError, match="row 2: the prompt or a response"):
        verdicts.read(save(tmp_path / "came.csv", lines), home)


def test_files_that_are_no_sheet_are_refused(sheet: Sheet, home: Path, tmp_path: Path) -> None:
    sheets.write(sheet, tmp_path / "sheet.csv", home)
    lines = opinions(sheet, candidate)
    came = tmp_path / "came.csv"
    with pytest.raises(DataError, match="cannot be read"):
        verdicts.read(came, home)
    with pytest.raises(DataError, match=r"row 3: id '.*-0001' is in row 2 already"):
        verdicts.read(save(came, [lines[0], *lines]), home)
    with pytest.raises(DataError, match=r"(?s)row 2.*row 6.*\nand 31 more"):
        verdicts.read(save(came, [line | {"verdict": "?"} for line in lines]), home)
    with pytest.raises(DataError, match="the column verdict is empty"):
        verdicts.read(save(came, [line | {"verdict": ""} for line in lines]), home)
    with pytest.raises(DataError, match="is of no sheet that was made in"):
        verdicts.read(save(came, [line | {"id": "../x-1"} for line in lines]), home)
    with pytest.raises(DataError, match="has no column verdict"):
        verdicts.read(save(came, [{k: v for k, v in line.items() if k != "verdict"} for line in lines]), home)
    came.write_bytes("id;prompt;A;B;verdict\nä".encode("latin-1"))
    with pytest.raises(DataError, match=r"cannot be read: .* save it as CSV \(UTF-8\) or Parquet"):
        verdicts.read(came, home)
    for content, message in ((b"", "has no column id"), (b"id,prompt,A,B,verdict\n", "has no row")):
        came.write_bytes(content)
        with pytest.raises(DataError, match=message):
            verdicts.read(came, home)


# ------------------------------------------------------------------------------------------------ what was said is kept
def said(sheet: Sheet, *choices: str) -> dict[int, Any]:
    """Verdicts on the first rows of a sheet: c(andidate), b(aseline), t(ie)."""
    words = {"c": "candidate", "b": "baseline", "t": "tie"}
    return {row.prompt_row: words[choice] for row, choice in zip(sheet.key.rows, "".join(choices), strict=False)}


def test_win_rate_with_ties_and_agreement_with_scores(sheet: Sheet, home: Path) -> None:
    """36 shown: 18 won, 9 tied, 9 lost; and 4 identical. The reward always prefers ppo: 18 of 27 agree."""
    entry = verdicts.keep(sheet.key, said(sheet, "c" * 18, "t" * 9, "b" * 9), "ann", home)
    assert entry["win_rate"]["value"] == pytest.approx((18 + 0.5 * 13) / 40)
    assert entry["win_rate"]["low"] < entry["win_rate"]["value"] < entry["win_rate"]["high"]
    assert (entry["wins"], entry["ties"], entry["losses"]) == pytest.approx((18 / 40, 13 / 40, 9 / 40))
    assert entry["agreement"]["reward"]["value"] == pytest.approx(18 / 27)
    assert entry["agreement"]["reward"]["n"] == 27
    assert [row["prompt_row"] for row in entry["rows"]] == list(range(40))
    assert [row["prompt_row"] for row in entry["rows"] if row["identical"]] == [36, 37, 38, 39]
    written = json.loads((home / "verdicts" / "20260101-000000-aaaaaa.json").read_text())
    assert written == {"run": "20260101-000000-aaaaaa", "readers": {"ann": entry}, "between": []}


def test_few_verdicts_are_not_sure(sheet: Sheet, home: Path) -> None:
    """Wilson (1927): 7 of 10 is 0.397 to 0.892; 10 of 10 at least n / (n + z²)."""
    for choices, value, low, high in (
        ("c" * 7 + "b" * 3, 0.7, 0.3968, 0.8922),
        ("c" * 10, 1.0, 10 / (10 + 3.8415), 1.0),
    ):
        key = dataclasses.replace(sheet.key, identical=())
        entry = verdicts.keep(key, said(sheet, choices), "ann", home)
        assert list(entry["win_rate"].values()) == pytest.approx([value, low, high, 10], abs=1e-4)


def test_of_identical_pairs_as_many_count_as_was_judged_of_the_others(sheet: Sheet, home: Path) -> None:
    entry = verdicts.keep(sheet.key, said(sheet, "c" * 18), "ann", home)
    assert sum(row["identical"] for row in entry["rows"]) == 2
    assert entry["win_rate"]["value"] == pytest.approx(19 / 20)


def test_two_readers_of_the_same_rows(sheet: Sheet, home: Path) -> None:
    """Both judged 20 rows, 10 alike as c, 5 alike as b, 5 not (c, b): p_o 0.75, p_e 0.75 0.5 + 0.25 0.5, kappa 0.5."""
    verdicts.keep(sheet.key, said(sheet, "c" * 15, "b" * 5, "c" * 10), "ann", home)
    verdicts.keep(sheet.key, said(sheet, "c" * 10, "b" * 10), "bob", home)
    [pair] = verdicts.kept(home, sheet.key.run)["between"]
    assert (pair["readers"], pair["rows"]) == (["ann", "bob"], 20)
    assert pair["agreement"] == pytest.approx(0.75)
    assert pair["kappa"] == pytest.approx(0.5)


def test_the_same_reader_again_replaces_and_another_sheet_needs_another_name(
    run: RunRecord, sheet: Sheet, home: Path
) -> None:
    verdicts.keep(sheet.key, said(sheet, "c" * 10), "ann", home)
    entry = verdicts.keep(sheet.key, said(sheet, "b" * 10), "ann", home)
    assert verdicts.kept(home, run.id)["readers"] == {"ann": entry}
    other = sheets.make(run, Store(home), "ppo,reference")
    with pytest.raises(ConfigError, match=r"'ann' has judged another sheet .* ppo against sft.*--by 'ann \(2\)'"):
        verdicts.keep(other.key, said(other, "c"), "ann", home)
    verdicts.keep(other.key, said(other, "c"), "ann (2)", home)
    assert verdicts.kept(home, run.id)["between"] == []  # they judged different things
    with pytest.raises(ConfigError, match="--by is empty"):
        verdicts.keep(sheet.key, said(sheet, "c"), " ", home)


def test_damaged_files_are_named(sheet: Sheet, home: Path, tmp_path: Path) -> None:
    assert verdicts.kept(home, sheet.key.run) == {"run": sheet.key.run, "readers": {}, "between": []}
    key = sheets.write(sheet, tmp_path / "sheet.csv", home)
    key.write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        verdicts.read(save(tmp_path / "came.csv", opinions(sheet, candidate)), home)
    path = home / "verdicts" / f"{sheet.key.run}.json"
    path.parent.mkdir()
    path.write_text("[]")
    with pytest.raises(ArtifactError, match="is damaged"):
        verdicts.kept(home, sheet.key.run)
