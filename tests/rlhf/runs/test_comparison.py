"""What differs between two runs, and what of it is more than noise."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.champions.ledger import find_run
from rlhf.errors import ConfigError
from rlhf.runs.comparison import Compared, Side, as_json, changes, compare, read, side_by_side, stages
from rlhf.statistics.intervals import Estimate
from rlhf.store.artifacts import Store
from tests.rlhf.made_runs import make_run, samples

PROMPTS = [f"prompt {number}" for number in range(60)]
GENERATOR = np.random.default_rng(0)
GOLD = GENERATOR.normal(size=60)


def sides(home: Path, *runs: Any) -> list[Side]:
    return [read(run, Store(home)) for run in runs]


def judged(home: Path, second: Any) -> list[Side]:
    """Two runs of different KL coefficients, the first of which has GOLD as its judge's scores."""
    other = {"ppo": {"enabled": True, "kl_coef": 0.1}}
    first = samples(PROMPTS, {"ppo_gold": GOLD})
    return sides(home, make_run(home, "1", first), make_run(home, "2", second, config=other))


def figure(a: Side, b: Side, name: str) -> Compared:
    return {found.name: found for found in compare(a, b)}[name]


def test_each_difference_is_said_once_with_the_stages_that_it_concerns(tmp_path: Path) -> None:
    newer = {"code rlhf/ppo/core.py": "d" * 64, "library torch": "2.14.0"}
    a, b = sides(
        tmp_path,
        make_run(tmp_path, "1"),
        make_run(
            tmp_path,
            "2",
            config={"ppo": {"enabled": True, "kl_coef": 0.1}, "resources": {"device": "auto"}},
            ingredients={"ppo": newer, "evaluate": newer},
        ),
    )
    found = [tuple(change) for change in changes(a, b)]
    assert sorted(found) == [
        ("code", "rlhf/ppo/core.py", "c" * 8, "d" * 8, ("ppo", "evaluate")),
        ("config", "ppo.kl_coef", 0.4, 0.1, ("ppo",)),
        ("libraries", "torch", "2.13.0", "2.14.0", ("ppo", "evaluate")),
        ("no number", "resources.device", "cpu", "auto", ()),
    ]
    assert stages(a, b) == {"prepare": "same", "ppo": "different", "evaluate": "different"}


def test_data_is_itself_under_another_name_and_other_data_is_not(tmp_path: Path) -> None:
    a, renamed, other = sides(
        tmp_path,
        make_run(tmp_path, "1"),
        make_run(
            tmp_path,
            "2",
            ingredients={
                "prepare": {"data.demonstrations[0] train.jsonl": None, "data.demonstrations[0] moved.jsonl": "d" * 64}
            },
        ),
        make_run(tmp_path, "3", ingredients={"prepare": {"data.demonstrations[0] train.jsonl": "e" * 64}}),
    )
    assert changes(a, renamed) == []
    assert stages(a, renamed)["prepare"] == "same result"  # the same content, made anew
    [change] = changes(a, other)
    assert change[:4] == ("data", "demonstrations[0]", "train.jsonl (dddddddd)", "train.jsonl (eeeeeeee)")


def test_settings_of_a_stage_that_only_one_run_has_are_settings(tmp_path: Path) -> None:
    one = make_run(tmp_path, "1")
    other = make_run(tmp_path, "2", config={"ppo": {"enabled": False, "kl_coef": 0.4}})
    del other.stages["ppo"]
    a, b = sides(tmp_path, one, other)
    assert stages(a, b)["ppo"] == "only in A"
    assert [change[:4] for change in changes(a, b)] == [("config", "ppo.enabled", True, False)]


def test_the_same_prompts_in_another_order_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    """A small steady gain, which the intervals do not show and the pairs do."""
    better = GOLD + GENERATOR.uniform(0.0, 0.2, 60)
    a, b = judged(tmp_path, samples(PROMPTS[::-1], {"ppo_gold": better[::-1]}))
    found = figure(a, b, "evaluate/ppo/gold")
    assert (found.test, found.noise) == ("prompt by prompt", False)
    assert found.difference.value == pytest.approx(found.b.value - found.a.value)
    assert found.difference.n == 60
    assert 0 < found.difference.low < found.difference.value < found.difference.high
    assert found.p == pytest.approx(1 / 201)  # the least that 200 resamples can say
    assert found.a.low < found.a.value < found.a.high  # its own interval is from the samples
    back = figure(b, a, "evaluate/ppo/gold")
    assert back.difference.value == pytest.approx(-found.difference.value)


def test_noise_is_called_noise(tmp_path: Path) -> None:
    a, b = judged(tmp_path, samples(PROMPTS, {"ppo_gold": GOLD + np.resize([0.5, -0.5], 60)}))
    assert figure(a, b, "evaluate/ppo/gold").noise is True


@pytest.mark.parametrize(
    ("prompts", "references", "pairs"),
    [
        (PROMPTS[:40], None, 40),  # a part of them
        ([*PROMPTS[:20], *(f"other {number}" for number in range(40))], None, None),  # too few
        (PROMPTS, ["another reference"] * 60, None),  # the same prompts, but not the same task
        (["the same"] * 60, None, None),
    ],
)
def test_what_is_paired(tmp_path: Path, prompts: list[str], references: list[str] | None, pairs: int | None) -> None:
    bounds = {"evaluate/ppo/gold_low": -1.0, "evaluate/ppo/gold_high": 1.0}
    n = len(prompts)
    a, b = sides(
        tmp_path,
        make_run(tmp_path, "1", samples(PROMPTS, {"ppo_gold": GOLD}), metrics=bounds),
        make_run(
            tmp_path,
            "2",
            samples(prompts, {"ppo_gold": GOLD[:n]}, {"reference": references} if references else None),
            metrics=bounds,
            config={"ppo": {"enabled": True, "kl_coef": 0.1}},
        ),
    )
    found = figure(a, b, "evaluate/ppo/gold")
    assert found.test == ("by the intervals" if pairs is None else "prompt by prompt")
    if pairs is not None:
        assert found.difference == Estimate(0.0, 0.0, 0.0, pairs)
        assert found.noise


def test_a_prompt_that_is_there_twice_is_paired_twice(tmp_path: Path) -> None:
    twice = [*PROMPTS[:30], *PROMPTS[:30]]
    a, b = sides(
        tmp_path,
        make_run(tmp_path, "1", samples(twice, {"ppo_gold": np.arange(60.0)}, {"reference": twice})),
        make_run(
            tmp_path,
            "2",
            samples(twice, {"ppo_gold": np.arange(60.0) + 1}, {"reference": twice}),
            config={"ppo": {"enabled": True, "kl_coef": 0.1}},
        ),
    )
    assert figure(a, b, "evaluate/ppo/gold").difference == Estimate(1.0, 1.0, 1.0, 60)


@pytest.mark.parametrize(
    ("changed", "column", "why"),
    [
        ({"input reward/model": "b" * 64}, "reward", "two reward models"),
        ({"input reward/model": "b" * 64}, "gold", ""),
        ({"input reward/model": "b" * 64}, "rougeL", ""),
        ({"input reward/held_out": "b" * 64}, "held_out", "two reward models"),
        ({"input reward/held_out": "b" * 64}, "reward", ""),
        ({"function g.py:gold: g.py": "8" * 64}, "gold", "two functions 'gold'"),
        ({"config.evaluate.scorers.gold.arguments.words": 9}, "gold", "two functions 'gold'"),
        ({"config.evaluate.scorers.golden.arguments.words": 9}, "gold", ""),
    ],
)
def test_scores_of_two_judges_are_not_compared(tmp_path: Path, changed: dict[str, Any], column: str, why: str) -> None:
    table = samples(PROMPTS, {f"ppo_{column}": GOLD})
    a, b = sides(
        tmp_path, make_run(tmp_path, "1", table), make_run(tmp_path, "2", table, ingredients={"evaluate": changed})
    )
    found = figure(a, b, f"evaluate/ppo/{column}")
    assert found.note == why
    assert (found.noise is None) == bool(why)
    assert found.test == ("none" if why else "prompt by prompt")


def test_win_rates_are_compared_by_their_intervals(tmp_path: Path) -> None:
    """Zou and Donner (2008): 0.7 [0.6, 0.8] and 0.9 [0.85, 0.93] differ by 0.2 - sqrt(0.05² + 0.1²) at least."""
    name = "evaluate/win_rate/gold"
    a, b = sides(
        tmp_path,
        make_run(
            tmp_path, "1", samples(PROMPTS, {}), metrics={name: 0.7, f"{name}_low": 0.6, f"{name}_high": 0.8, "x": 1.0}
        ),
        make_run(
            tmp_path,
            "2",
            samples(PROMPTS, {}),
            metrics={name: 0.9, f"{name}_low": 0.85, f"{name}_high": 0.93, "x": 2.0},
            config={"ppo": {"enabled": True, "kl_coef": 0.1}},
        ),
    )
    found = figure(a, b, name)
    assert found.test == "by the intervals"
    assert found.difference.low == pytest.approx(0.2 - math.hypot(0.05, 0.1))
    assert found.difference.high == pytest.approx(0.2 + math.hypot(0.03, 0.1))
    assert found.noise is False
    assert figure(a, b, "x").note == "it has no interval"
    assert figure(b, a, name).difference.high == pytest.approx(-found.difference.low)


def test_without_the_samples_the_intervals_are_left(tmp_path: Path) -> None:
    bounds = {"evaluate/ppo/gold_low": -1.0, "evaluate/ppo/gold_high": 1.0}
    runs = [make_run(tmp_path, run, samples(PROMPTS, {"ppo_gold": GOLD}), metrics=bounds) for run in ("1", "2")]
    shutil.rmtree(tmp_path / "store" / "evaluate")
    a, b = sides(tmp_path, *runs)
    assert figure(a, b, "evaluate/ppo/gold").test == "by the intervals"


def test_json_has_no_nan(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, run, samples(PROMPTS, {"ppo_gold": GOLD}), metrics={"x": 1.0}) for run in ("1", "2")]
    found = json.loads(json.dumps(as_json(*sides(tmp_path, *runs)), allow_nan=False))
    assert found["stages"]["evaluate"] == "same"
    by_name = {entry["name"]: entry for entry in found["figures"]}
    assert by_name["evaluate/ppo/gold"]["noise"] is True
    assert by_name["x"]["difference"] == {"value": 0.0, "low": None, "high": None, "n": 0}


def test_side_by_side_only_what_varies(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, run, samples(PROMPTS, {"ppo_gold": GOLD}), config={"ppo": {"enabled": True, "kl_coef": kl}})
        for run, kl in (("1", 0.4), ("2", 0.1), ("3", 0.4))
    ]
    rows = side_by_side(sides(tmp_path, *runs))
    assert [row.settings for row in rows] == [{"ppo.kl_coef": 0.4}, {"ppo.kl_coef": 0.1}, {"ppo.kl_coef": 0.4}]
    assert [row.metrics["evaluate/ppo/gold"] for row in rows] == pytest.approx([GOLD.mean()] * 3)
    assert side_by_side(sides(tmp_path, runs[0], runs[2]))[0].settings == {}


def test_a_run_is_found_by_its_id_or_as_the_last_finished_one(tmp_path: Path) -> None:
    for run, status in (("20260101-1", "done"), ("20260102-2", "done"), ("20260103-3", "failed")):
        make_run(tmp_path, run, status=status)
    assert find_run(tmp_path, "20260101-1").id == "20260101-1"
    assert find_run(tmp_path, "20260103-3").status == "failed"
    assert find_run(tmp_path, "demo").id == "20260102-2"
    with pytest.raises(ConfigError, match=r"'20260101-7' is neither a run .* did you mean '20260101-1'"):
        find_run(tmp_path, "20260101-7")
    with pytest.raises(ConfigError, match="champion:demo: that pipeline has no champion yet"):
        find_run(tmp_path, "champion:demo")
