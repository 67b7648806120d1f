"""Judges of other kinds than people: what they make, and how far they agree with people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rlhf.config.pipeline import PipelineConfig
from rlhf.context import Context
from rlhf.errors import DataError, RewardError
from rlhf.judge import stage as judge
from rlhf.judge.candidates import Group, judged
from rlhf.judge.judges import ByComparison, ByScore, Judge, Judged
from rlhf.prepare import stage as prepare
from rlhf.prepare.settle import split_of
from rlhf.prepare.sources import SPLITS
from rlhf.statistics.agreement import with_people
from rlhf.tracking.tracker import NullTracker

OFF: dict[str, Any] = dict.fromkeys(("sft", "reward", "ppo", "evaluate"), "off")
MODEL = {"init": "random", "layers": 1, "width": 16, "heads": 2, "vocab_size": 300, "context": 128}


def longer(
    prompts: Sequence[str], responses: Sequence[str], columns: Any
) -> list[float]:  # a judge that likes long texts
    return [float(len(response)) for response in responses]


def groups(*texts: Sequence[str]) -> list[Group]:
    return [Group(f"p{number}", list(group), {}) for number, group in enumerate(texts)]


# ------------------------------------------------------------------------------------------------------------ verdicts
def test_best_and_worst() -> None:
    found = judged(ByScore(longer), groups(["aa", "a", "aaa"], ["b"], ["cc", "dd"])).pairs(True, 0.0)
    assert found.to_pylist() == [{"prompt": "p0", "chosen": "aaa", "rejected": "a", "difference": 2.0}]


def test_all_pairs_of_a_ranking() -> None:
    found = judged(ByScore(longer), groups(["aa", "a", "aaa"], ["cc", "d"])).pairs(False, 0.0).to_pylist()
    assert {(row["chosen"], row["rejected"], row["difference"], row["ranking"]) for row in found} == {
        ("aaa", "a", 2.0, 0), ("aaa", "aa", 1.0, 0), ("aa", "a", 1.0, 0), ("cc", "d", 1.0, 1)
    }  # fmt: skip


def test_small_differences_are_ties() -> None:
    found = judged(ByScore(longer), groups(["aa", "a", "aaa"])).pairs(False, 1.0).to_pylist()
    assert [(row["chosen"], row["rejected"]) for row in found] == [("aaa", "a")]


def test_no_function_is_asked_about_no_response() -> None:
    def score(prompts: Sequence[str], responses: Sequence[str], columns: Any) -> list[float]:
        return [max(map(float, map(len, responses)))]

    found = judged(ByScore(score), groups([], []))
    assert found.ratings().num_rows == found.pairs(True, 0.0).num_rows == 0


def test_ratings() -> None:
    found = judged(ByScore(longer), groups(["aa", "a"], ["b"])).ratings().to_pylist()
    assert [(row["prompt"], row["response"], row["score"]) for row in found] == [
        ("p0", "aa", 2.0), ("p0", "a", 1.0), ("p1", "b", 1.0)
    ]  # fmt: skip


def first_is_better(prompts: list[str], firsts: list[str], seconds: list[str]) -> list[float]:
    """Half position, half length: what is shown first gets 1."""
    return [1.0 + len(one) - len(other) for one, other in zip(firsts, seconds, strict=True)]


def test_a_comparison_is_asked_in_both_orders() -> None:
    found = ByComparison(first_is_better, "f").compare(["p"] * 3, ["aaaa", "a", "bb"], ["a", "aaaa", "bb"], {})
    assert found.margins.tolist() == [3.0, -3.0, 0.0]
    assert found.position_bias() == {"consistency": pytest.approx(2 / 3), "shown_first_share": pytest.approx(4 / 6)}
    made = judged(ByComparison(first_is_better, "f"), groups(["aa", "a", "aaaa"])).pairs(False, 0.0).to_pylist()
    assert [(row["chosen"], row["rejected"]) for row in made] == [("aaaa", "aa"), ("aaaa", "a"), ("aa", "a")]
    assert Judged(np.array([1.0]), None).position_bias() == {}


@pytest.mark.parametrize("by", [ByScore(longer), ByComparison(first_is_better, "f")])
def test_a_prompt_whose_samples_are_all_blank_gives_nothing(by: Judge) -> None:
    found = judged(by, groups([], ["aa", "a"], []))
    for best_and_worst in (True, False):
        assert [row["prompt"] for row in found.pairs(best_and_worst, 0.0).to_pylist()] == ["p1"]
    if found.scores is not None:
        assert [row["prompt"] for row in found.ratings().to_pylist()] == ["p1", "p1"]


@pytest.mark.parametrize("answer", [[1.0], [1.0, float("nan")], [1.0, "x"], None])
def test_a_comparison_that_fails(answer: Any) -> None:
    with pytest.raises(RewardError, match=r"judge\.function 'mine'"):
        ByComparison(lambda *_: answer, "mine").compare(["p", "q"], ["a", "b"], ["c", "d"], {})


def test_agreement_with_people_by_hand() -> None:
    chosen, rejected = [f"c{i}" for i in range(10)], [f"r{i}" for i in range(10)]
    margins = np.array([1.0] * 7 + [-1.0] * 2 + [0.0])
    found = with_people(margins, chosen, rejected, seed=0)
    assert found["accuracy"] == pytest.approx(0.75)  # a tie counts one half
    assert (found["pairs"], found["ties"]) == (10, 1)
    assert found["accuracy_low"] < 0.75 < found["accuracy_high"]
    perfect = with_people(np.ones(10), chosen, rejected, seed=0)
    assert (perfect["accuracy"], perfect["kappa"]) == (1.0, 1.0)


# ------------------------------------------------------------------------------------------------------------ the stage
class Run:
    """The stages prepare and judge on some data."""

    def __init__(self, folder: Path, data: dict[str, Any], section: dict[str, Any]) -> None:
        data = {"validation_fraction": 0.0, "test_fraction": 0.3} | data
        self.config = PipelineConfig.model_validate({**OFF, "model": MODEL, "data": data, "judge": section})
        outs = {name: folder / name for name in ("prepare", "judge")}
        for path in outs.values():
            path.mkdir()
        prepare.run(Context("prepare", self.config, {}, outs["prepare"], folder / "work", NullTracker()))
        inputs = {"prepare": outs["prepare"]}
        self.finals = judge.run(Context("judge", self.config, inputs, outs["judge"], folder / "work", NullTracker()))
        self.out, self.report = outs["judge"], json.loads((outs["judge"] / "report.json").read_text())

    def rows(self, kind: str, split: str = "train") -> list[dict[str, Any]]:
        return pq.read_table(self.out / kind / f"{split}.parquet").to_pylist()


def pairs(count: int, good: str = "good") -> list[dict[str, Any]]:
    """Pairs of which the chosen side has a certain word; every tenth from another source is the other way round."""
    rows = []
    for i in range(count):
        one, other = f"{good} answer {i}", f"poor answer {i} of more words"
        swap = i % 10 == 9
        rows.append({"prompt": f"question {i}", "chosen": other if swap else one, "rejected": one if swap else other,
                     "source": "odd" if swap else "plain"})  # fmt: skip
    return rows


def test_brevity_judges_the_pairs_of_the_data(tmp_path: Path) -> None:
    section = {"by": "rewards", "rewards": {"brevity": 1.0}, "source": "source"}
    made = Run(tmp_path, {"rows": pairs(60)}, section)
    assert all(row["chosen"].startswith("good") and row["difference"] == 3.0 for row in made.rows("preferences"))
    assert made.finals["judge/people_accuracy"] == pytest.approx(0.9, abs=0.15)
    by_source = made.report["by_source"]
    assert (by_source["plain"]["accuracy"], by_source["odd"]["accuracy"]) == (1.0, 0.0)
    assert made.report["made"]["train"]["preferences"] == len(made.rows("preferences"))


@pytest.mark.slow
def test_a_judge_model_learns_from_people_and_rates(tmp_path: Path) -> None:
    """What it learnt from pairs, it says of each response: the ratings that a reward model may learn from."""
    rows = [row for row in pairs(600) if row["source"] == "plain"]
    model = {"epochs": 3, "learning_rate": 3e-3, "batch_size": 16}
    made = Run(tmp_path, {"rows": rows}, {"by": "model", "model": model, "gives": "ratings"})
    assert made.finals["judge/people_accuracy"] > 0.95
    assert made.finals["judge/people_kappa"] > 0.9
    ratings = {row["response"]: row["score"] for row in made.rows("ratings")}
    assert len(ratings) == 2 * made.report["made"]["train"]["prompts"]
    assert min(score for text, score in ratings.items() if text.startswith("good")) > max(
        score for text, score in ratings.items() if text.startswith("poor")
    ) - 1.0  # fmt: skip
    assert made.rows("preferences")  # people's, passed on


@pytest.mark.slow
def test_samples_and_the_reference_ranked_by_rouge(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "reference": f"the answer number {i}"} for i in range(12)]
    section = {
        "by": "rewards", "rewards": {"similarity": 1.0}, "samples": 3, "with_reference": True, "gives": "rankings",
        "max_new_tokens": 8, "prompts": 6,
    }  # fmt: skip
    made = Run(tmp_path, {"rows": rows}, section)
    found = made.rows("preferences")
    references = {row["reference"] for row in rows}
    assert references & {row["chosen"] for row in found}
    assert not references & {row["rejected"] for row in found}
    assert len({row["ranking"] for row in found}) == made.report["made"]["train"]["prompts"] <= 6
    again = tmp_path / "again"
    again.mkdir()
    assert Run(again, {"rows": rows}, section).rows("preferences") == found


def test_prompts_without_a_response_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {False: ["a", "a b"], True: [" ", ""]}
    monkeypatch.setattr(
        "rlhf.judge.sampling.samples", lambda context, split, given: (answers["1" in text] for text in given)
    )
    rows = [{"prompt": f"question {i}"} for i in range(20)]
    made = Run(tmp_path, {"rows": rows}, {"by": "rewards", "rewards": {"brevity": 1.0}, "samples": 2}).report["made"]
    assert sum(made[split]["prompts_without_response"] for split in SPLITS) == 11  # 1, 10, 11, ..., 19
    assert sum(made[split]["preferences"] for split in SPLITS) == 9


def test_one_pair_of_people_has_no_interval(tmp_path: Path) -> None:
    """An interval over one pair does not exist, which JSON says as null."""
    rows = pairs(60)
    rare = next(row for row in rows if split_of(row["prompt"], 0.0, 0.3) == "test")
    rows = [row | {"source": "rare" if row is rare else "plain"} for row in rows]
    section = {"by": "rewards", "rewards": {"brevity": 1.0}, "source": "source"}
    found = Run(tmp_path, {"rows": rows}, section).report["by_source"]["rare"]
    assert (found["pairs"], found["accuracy_low"], found["accuracy_high"]) == (1, None, None)


def test_an_agreement_that_cannot_be_measured_fails_no_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The samples' prompts have the column ``n``, people's pairs have not."""
    source = "def f(prompts, firsts, seconds, n):\n    return [len(a) - len(b) for a, b in zip(firsts, seconds)]\n"
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.setattr("rlhf.judge.sampling.samples", lambda context, split, given: (["a", "bb"] for _ in given))
    rows = [*({"prompt": f"question {i}", "n": i} for i in range(20)), *pairs(60)]
    section = {"by": "comparison", "function": f"{tmp_path}/mine.py:f", "samples": 2}
    made = Run(tmp_path, {"rows": rows}, section)
    assert "judge.function" in made.report["no_agreement"]
    assert "with_people" not in made.report
    assert made.rows("preferences")
    assert "agreement with people's test pairs is not measured: judge.function" in caplog.text


def test_nothing_to_prefer_is_said(tmp_path: Path) -> None:
    section = {"by": "rewards", "rewards": {"brevity": 1.0}, "min_margin": 100.0}
    with pytest.raises(DataError, match=r"gave no preferences.*judge\.min_margin"):
        Run(tmp_path, {"rows": pairs(20)}, section)


@pytest.mark.parametrize(
    ("section", "fragment"),
    [
        ({"samples": 2}, "by is `people`"),
        ({"by": "rewards"}, "rewards must be given"),
        ({"by": "comparison"}, "function must be given"),
        ({"by": "comparison", "function": "a:b", "gives": "ratings"}, "a comparison gives no scores"),
        ({"by": "model", "with_reference": True}, "with_reference is for samples"),
        ({"by": "model", "samples": 1}, "samples is 1"),
        ({"by": "rewards", "rewards": {"model": 1.0}}, "set by: model"),
        ({"by": "model", "model": {"objective": "regression"}}, "learns from data.ratings"),
    ],
)
def test_settings_that_do_not_go_together(section: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment.replace(".", r"\.")):
        PipelineConfig.model_validate({**OFF, "model": MODEL, "data": {"rows": pairs(2)}, "judge": section})
