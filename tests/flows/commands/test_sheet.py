"""``rlhf sheet``: from a run to a sheet, from a filled sheet to what people said."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rlhf.made_runs import make_run, samples

Rlhf = Callable[..., tuple[int, str, str]]
PROMPTS = [f"prompt {number}" for number in range(12)]


@pytest.fixture
def rlhf(offline_rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch) -> Rlhf:
    """The command line on a terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")
    return offline_rlhf


@pytest.fixture
def out(rlhf: Rlhf, home: Path, tmp_path: Path) -> Path:
    """A sheet of a run in which PPO always gets the higher reward, and is always "ppo on ..."."""
    make_run(home, "20260101-000000-aaaaaa", samples(PROMPTS, {"sft_reward": [0.0] * 12, "ppo_reward": [1.0] * 12}))
    path = tmp_path / "sheet.csv"
    code, said, error = rlhf("sheet", "demo", "--out", str(path))
    assert (code, error) == (0, "")
    assert "12 pairs of responses of ppo and sft to run 20260101-000000-aaaaaa; 0 identical" in said
    return path


def filled(path: Path, preferred: str) -> str:
    """A copy of a sheet on which every row is judged for the response that begins so."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        line["verdict"] = "A" if line["A"].startswith(preferred) else "B" if line["B"].startswith(preferred) else "tie"
    came = path.with_name("came.csv")
    with came.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(lines)
    return str(came)


def test_there_and_back(rlhf: Rlhf, out: Path, home: Path) -> None:
    code, said, error = rlhf("sheet", "--read", filled(out, "ppo on"), "--by", "ann")
    assert (code, error) == (0, "")
    assert "ann: 12 of 12 pairs of ppo and sft judged" in said
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "win rate 1.000 [0.76, 1.00] wins 1.00, ties 0.00, losses 0.00" in lines
    assert "Reward agrees 1.000 [0.76, 1.00] 12 pairs" in lines
    code, said, _ = rlhf("sheet", "--read", filled(out, "nobody"), "--by", "bob")
    assert "ann agrees 0.00 12 pairs, Cohen's kappa 0.00" in [" ".join(line.split()) for line in said.splitlines()]
    code, said, _ = rlhf("sheet", "--read", filled(out, "nobody"), "--by", "bob", "--json")
    assert json.loads(said)["win_rate"]["value"] == 0.5
    written = json.loads((home / "verdicts" / "20260101-000000-aaaaaa.json").read_text())
    assert set(written["readers"]) == {"ann", "bob"}


def test_for_programs(rlhf: Rlhf, out: Path, home: Path, tmp_path: Path) -> None:
    code, said, _ = rlhf("sheet", "demo", "--out", str(tmp_path / "b.parquet"), "--rows", "5", "--seed", "3", "--json")
    found = json.loads(said)
    assert code == 0
    assert (found["rows"], found["identical"]) == (5, 0)
    assert Path(found["key"]).parent == home / "sheets"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo",), "expected `rlhf sheet RUN --out sheet.csv`"),
        (("--out", "x.csv"), "expected `rlhf sheet RUN --out sheet.csv`"),
        (("demo", "--out", "x.csv", "--by", "ann"), "expected `rlhf sheet RUN --out sheet.csv`"),
        (("demo", "--read", "x.csv"), "--read takes a sheet that came back"),
        (("--read", "x.csv", "--seed", "0"), "--read takes a sheet that came back"),
        (("--read", "nowhere.csv"), "nowhere.csv cannot be read"),
        (("demo", "--out", "x.csv", "--rows", "0"), "--rows is 0"),
        (("demo", "--out", "x.csv", "--seed", "-1"), "--seed is -1"),
        (("demo", "--out", "x.csv", "--policies", "ppo,best"), "--policies ppo,best: expected two of sft, ppo"),
        (("nothing", "--out", "x.csv"), "'nothing' is neither a run in"),
    ],
)
@pytest.mark.usefixtures("out")
def test_what_is_refused(rlhf: Rlhf, arguments: tuple[str, ...], message: str) -> None:
    code, said, error = rlhf("sheet", *arguments)
    assert (code, said) == (2, "")
    assert message in error


def test_an_odd_verdict_is_refused(rlhf: Rlhf, out: Path) -> None:
    out.write_text(out.read_text("utf-8-sig").replace("prompt 3", "prompt 4", 1).replace(",,", ",maybe,", 1))
    code, _, error = rlhf("sheet", "--read", str(out), "--by", "ann")
    assert code == 2
    assert "verdict 'maybe'; allowed are A, B, tie" in error
    assert "is not what the sheet showed" in error
