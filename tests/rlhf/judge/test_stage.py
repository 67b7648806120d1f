"""Agreement of annotators against hand numbers, and the pairs passed on as they were."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.config import yaml_files as settings
from rlhf.context import Context
from rlhf.errors import DataError
from rlhf.judge import stage as judge
from rlhf.prepare import stage as prepare
from rlhf.statistics.agreement import agreement, annotators_report
from rlhf.tracking.tracker import NullTracker
from tests.rlhf.projects import good


def table(both_yes: int, yes_no: int, no_yes: int, both_no: int) -> tuple[list[int | None], list[int | None]]:
    """Two raters with this table of counts."""
    pairs = [(1, 1)] * both_yes + [(1, 0)] * yes_no + [(0, 1)] * no_yes + [(0, 0)] * both_no
    return [first for first, _ in pairs], [second for _, second in pairs]


def run_judge(folder: Path, *overrides: str) -> tuple[Path, dict[str, float]]:
    """Prepare the good project, then judge it."""
    config = settings.load(good(folder), overrides=overrides)
    source, out = folder / "prepare", folder / "judge"
    source.mkdir()
    out.mkdir()
    prepare.run(Context("prepare", config, {}, source, folder / "checkpoints", NullTracker()))
    context = Context("judge", config, {"prepare": source}, out, folder / "checkpoints", NullTracker())
    return out, judge.run(context)


# --- kappa


def test_kappa_by_hand() -> None:
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5."""
    found = agreement(*table(20, 5, 10, 15))
    assert found.pairs == 50
    assert found.agreement == pytest.approx(0.7)
    assert found.kappa == pytest.approx(0.4)


def test_interval_by_hand() -> None:
    """The standard error of Fleiss, Cohen and Everitt for the table above, term by term."""
    kappa, expected, n = 0.4, 0.5, 50
    on = 0.4 * (1 - (0.5 + 0.6) * 0.6) ** 2 + 0.3 * (1 - (0.5 + 0.4) * 0.6) ** 2
    off = (0.1 * (0.6 + 0.5) ** 2 + 0.2 * (0.4 + 0.5) ** 2) * 0.6**2
    error = math.sqrt((on + off - (kappa - expected * (1 - kappa)) ** 2) / (n * (1 - expected) ** 2))
    found = agreement(*table(20, 5, 10, 15))
    assert found.kappa_low == pytest.approx(kappa - 1.959964 * error, rel=1e-6)
    assert found.kappa_high == pytest.approx(kappa + 1.959964 * error, rel=1e-6)


def test_interval_covers() -> None:
    """Two raters who each err with 20 %: kappa is 1 - 2 * 2 * 0.8 * 0.2 = 0.36. 95 % of the intervals have it."""
    rng = random.Random(0)
    hits = 0
    for _ in range(400):
        truth = [rng.random() < 0.5 for _ in range(300)]
        first, second = ([int(side != (rng.random() < 0.2)) for side in truth] for _ in range(2))
        found = agreement(first, second)
        assert found.kappa_low is not None
        assert found.kappa_high is not None
        hits += found.kappa_low <= 0.36 <= found.kappa_high
    assert hits / 400 == pytest.approx(0.95, abs=0.03)


def test_kappa_at_its_ends() -> None:
    assert agreement(*table(10, 0, 0, 10)) == (20, 1.0, 1.0, 1.0, 1.0)
    assert agreement(*table(0, 10, 10, 0)).kappa == pytest.approx(-1.0)
    assert agreement(*table(25, 25, 25, 25)).kappa == pytest.approx(0.0)


def test_only_what_both_judged_counts() -> None:
    first, second = table(20, 5, 10, 15)
    padded = agreement([*first, None, 1, None], [*second, 0, None, None])
    assert padded == agreement(first, second)


def test_without_a_kappa() -> None:
    assert agreement([None, 1], [1, None]) == (0, None, None, None, None)
    assert agreement([1, 1], [1, 1]) == (2, 1.0, None, None, None)


# --- the report


def pairs(count: int, errors: tuple[float, float], seed: int) -> pa.Table:
    """Pairs whose label is always right, and two annotators who err independently."""
    rng = random.Random(seed)
    columns = {
        name: ["rejected" if rng.random() < e else "chosen" for _ in range(count)]
        for name, e in zip("ab", errors, strict=True)
    }
    texts = {"chosen": [f"good {i}" for i in range(count)], "rejected": [f"bad {i}" for i in range(count)]}
    return pa.table({**texts, **columns})


def test_chance_is_counted_over_sides() -> None:
    """Annotators who err in 10 % of the pairs agree in 82 %; over sides, chance is 50 %, so kappa is 0.64.

    Over "chosen" and "rejected", chance would be 82 % too, and kappa 0.
    """
    found = annotators_report(pairs(20_000, (0.1, 0.1), seed=1), ["a", "b"])
    assert found["overall"]["agreement"] == pytest.approx(0.82, abs=0.01)
    assert found["overall"]["kappa"] == pytest.approx(0.64, abs=0.02)
    assert found["overall"]["label_agreement"] == pytest.approx(0.9, abs=0.01)


def test_kappa_does_not_depend_on_the_label() -> None:
    """Recording the label the other way round, and turning the verdicts with it, changes no agreement."""
    one = pairs(200, (0.1, 0.3), seed=2)
    turn = {"chosen": "rejected", "rejected": "chosen"}
    columns = {name: [turn[verdict] for verdict in one[name].to_pylist()] for name in "ab"}
    other = pa.table({"chosen": one["rejected"], "rejected": one["chosen"], **columns})
    assert annotators_report(one, ["a", "b"])["between"] == annotators_report(other, ["a", "b"])["between"]


def test_three_annotators() -> None:
    made = pairs(100, (0.1, 0.2), seed=3)
    made = made.append_column("c", made["a"])
    found = annotators_report(made, ["a", "b", "c"])
    assert list(found["between"]) == ["a, b", "a, c", "b, c"]
    assert found["between"]["a, c"]["kappa"] == 1.0
    kappas = [pair["kappa"] for pair in found["between"].values()]
    assert found["overall"]["kappa"] == pytest.approx(sum(kappas) / 3)


def test_lengths() -> None:
    made = pa.table({"chosen": ["aaa", "b", "cc"], "rejected": ["a", "bbb", "dd"]})
    assert annotators_report(made, [])["length"] == {
        "chosen_mean": 2.0,
        "rejected_mean": 2.0,
        "chosen_longer": pytest.approx(1 / 3),
        "equal": pytest.approx(1 / 3),
    }


# --- the stage


def test_pairs_are_passed_on(tmp_path: Path) -> None:
    out, finals = run_judge(tmp_path)
    for split in ("train", "validation", "test"):
        name = f"preferences/{split}.parquet"
        assert (out / name).read_bytes() == (tmp_path / "prepare" / name).read_bytes()
    report = json.loads((out / "report.json").read_text("utf-8"))
    # of 40 pairs the odd ones are judged: anna takes the label, ben the other side unless 3 divides the number
    assert report["with_label"] == {
        "anna": {"verdicts": 20, "agreement": 1.0},
        "ben": {"verdicts": 20, "agreement": pytest.approx(7 / 20)},
    }
    assert report["between"]["anna, ben"]["pairs"] == 20
    assert finals["judge/pairs"] == 40.0
    assert finals["judge/agreement"] == pytest.approx(7 / 20)
    assert finals["judge/label_agreement"] == pytest.approx(27 / 40)
    assert finals["judge/chosen_longer"] == 0.0
    assert finals["judge/kappa"] == report["between"]["anna, ben"]["kappa"]


def test_without_annotators(tmp_path: Path) -> None:
    _, finals = run_judge(tmp_path, "judge.annotators=[]")
    assert finals == {"judge/pairs": 40.0, "judge/chosen_longer": 0.0}


def test_annotators_that_prepare_did_not_check(tmp_path: Path) -> None:
    """``prepare`` may come from the cache, from before the annotators were named."""
    config = settings.load(good(tmp_path), overrides=["judge.annotators=[annna]"])
    folder = tmp_path / "prepare" / "preferences"
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        rows = {"prompt": ["p"], "chosen": ["c"], "rejected": ["r"], "anna": ["maybe"]}
        pq.write_table(pa.table(rows).slice(0, split != "validation"), folder / f"{split}.parquet")
    out = tmp_path / "out"
    out.mkdir()

    def attempt(*annotators: str) -> str:
        changed = settings.load(tmp_path / "config.yaml", overrides=[f"judge.annotators={list(annotators)}"])
        context = Context("judge", changed, {"prepare": tmp_path / "prepare"}, out, out, NullTracker())
        with pytest.raises(DataError) as caught:
            judge.run(context)
        return str(caught.value)

    assert "no column 'annna'" in attempt(*config.judge.annotators)
    assert "did you mean 'anna'?" in attempt(*config.judge.annotators)
    assert "test.parquet row 1, column 'anna': 'maybe' is not a verdict" in attempt("anna")
    assert list(out.iterdir()) == []
