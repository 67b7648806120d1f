"""``rlhf diff`` and ``rlhf compare``: what they print, for people and for programs, and what they refuse."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.rlhf.made_runs import make_run, samples

Rlhf = Callable[..., tuple[int, str, str]]
PROMPTS = [f"prompt {number}" for number in range(40)]
SCORES = np.random.default_rng(1).normal(size=40)
WINS = {
    "evaluate/win_rate/held_out": 0.7,
    "evaluate/win_rate/held_out_low": 0.6,
    "evaluate/win_rate/held_out_high": 0.8,
}


@pytest.fixture
def rlhf(offline_rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch) -> Rlhf:
    """The command line on a terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")
    return offline_rlhf


@pytest.fixture
def two(home: Path) -> Path:
    """A home folder with two runs, of which the second one has a higher reward, by another reward model."""
    columns = {"ppo_gold": SCORES, "ppo_reward": SCORES, "ppo_kl": SCORES**2, "ppo_rougeL": SCORES, "sft_gold": SCORES}
    more = {"evaluate/win_rate/reward": 0.6, "ppo/overoptimised": 0.0}  # more than fits into 100 columns
    make_run(home, "20260101-000000-aaaaaa", samples(PROMPTS, columns), metrics=WINS | more)
    make_run(
        home,
        "20260102-000000-bbbbbb",
        samples(PROMPTS, columns | {"ppo_gold": SCORES + np.linspace(0.5, 1.5, 40), "ppo_kl": SCORES**2}),
        metrics=WINS,
        config={"ppo": {"enabled": True, "kl_coef": 0.1}},
        ingredients={"evaluate": {"input reward/model": "b" * 64}},
        started=1_700_100_000.0,
    )
    return home


def test_diff_for_people(rlhf: Rlhf, two: Path) -> None:
    code, out, error = rlhf("diff", "20260101-000000-aaaaaa", "demo")
    assert (code, error) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[1].startswith("B 20260102-000000-bbbbbb demo, ")
    assert any(line.startswith("prepare the same artifact") for line in lines)
    assert any(line == "settings ppo.kl_coef: 0.4 -> 0.1 ppo" for line in lines)
    verdicts = {line.split()[0]: line for line in lines if line}
    assert verdicts["Gold"].endswith("yes* p 0.005")
    assert verdicts["ROUGE-L"].endswith("no* p 1.000")
    assert "not tested:" in verdicts["Reward"]
    assert any(line.startswith("win rate by held-out reward 0.700 0.700") for line in lines)
    assert "* prompt by prompt, on 40 prompts that both answered" in out


def test_diff_for_programs(rlhf: Rlhf, two: Path) -> None:
    code, out, _ = rlhf("diff", "20260101-000000-aaaaaa", "demo", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["stages"] == {"prepare": "same", "ppo": "different", "evaluate": "different"}
    by_name = {figure["name"]: figure for figure in found["figures"]}
    assert by_name["evaluate/ppo/gold"]["noise"] is False
    assert by_name["evaluate/sft/gold"]["noise"] is True


def test_diff_of_a_run_with_itself(rlhf: Rlhf, two: Path) -> None:
    code, out, _ = rlhf("diff", "demo", "demo")
    assert code == 0
    assert "Nothing differs that a result depends on." in out
    assert "yes" not in out


def test_compare_for_people_fits_100_columns(rlhf: Rlhf, two: Path) -> None:
    code, out, error = rlhf("compare")
    assert (code, error) == (0, "")
    table, _, hint = out.partition("There are also ")
    assert max(map(len, table.splitlines())) <= 100
    assert "20260101-000000-aaaaaa" in table
    assert "20260102-000000-bbbbbb" in table  # a run's id is never cut or broken
    assert "[0.60, 0.80]" in table
    assert "--metrics" in hint


def test_compare_for_programs(rlhf: Rlhf, two: Path) -> None:
    code, out, _ = rlhf("compare", "--csv", "--metrics", "evaluate/win_rate/held_out,evaluate/ppo/gold")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["ppo.kl_coef"] for row in rows] == ["0.4", "0.1"]
    assert [row["evaluate/win_rate/held_out_low"] for row in rows] == ["0.6", "0.6"]
    assert float(rows[0]["evaluate/ppo/gold"]) == pytest.approx(SCORES.mean())
    code, out, _ = rlhf("compare", "--json", "--last", "1")
    [row] = json.loads(out)
    assert row["run"] == "20260102-000000-bbbbbb"
    assert row["began"] == "2023-11-16T02:00:00Z"
    assert row["evaluate/win_rate/held_out_high"] == 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("diff", "demo", "nothing"), "'nothing' is neither a run in"),
        (("diff", "demo", "20260101-000000-aaaaab"), "did you mean '20260101-000000-aaaaaa'?"),
        (("compare", "--metrics", "evaluate/ppo/golt"), "no run has 'evaluate/ppo/golt'; did you mean"),
        (("compare", "--pipeline", "other"), "no run of other in"),
        (("compare", "demo", "--pipeline", "demo"), "not both"),
        (("compare", "--last", "0"), "--last is 0"),
    ],
)
def test_what_is_refused(rlhf: Rlhf, two: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, error = rlhf(*arguments)
    assert (code, out) == (2, "")
    assert message in error


def test_without_any_run(rlhf: Rlhf) -> None:
    code, _, error = rlhf("compare")
    assert code == 2
    assert "no run of any pipeline" in error
