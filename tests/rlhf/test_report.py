"""The report: what it says, that it says it safely, and that the same numbers give the same bytes."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rlhf import plots, report

EVIL = "<script>alert('x')</script> & <b>bold</b> \"quoted\""
N = 40


def estimate(value: float, half: float, count: int = N) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "n": count}


def made(
    reward: tuple[float, float] = (1.0, 0.2), gold: tuple[float, float] = (0.3, 0.1)
) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]], dict[str, list[Any]]]:
    """A report of base, SFT, PPO and references; ``reward`` and ``gold`` are the gain of PPO and its half interval."""
    generator = np.random.default_rng(0)
    scores = {
        name: {
            "reward": generator.normal(mean, 1, N),
            "gold": generator.normal(mean / 2, 0.5, N),
            "length_tokens": generator.integers(5, 40, N).astype(float),
        }
        for name, mean in (("base", -2.0), ("sft", 0.0), ("ppo", 1.0), ("reference", 0.0))
    }
    scores["reference"]["gold"][:] = math.nan
    trained_on = {"training": {"reward": generator.normal(0.5, 2, 90)}}
    metrics = {
        name: {metric: estimate(float(np.mean(values)), 0.1) for metric, values in of.items()}
        for name, of in scores.items()
    }
    for name in ("base", "sft", "ppo"):
        metrics[name]["kl"] = estimate(7.25 if name == "ppo" else 0.0, 0.5)
        metrics[name]["rougeL"] = estimate(0.4, 0.02, N - 1)
    made_report = {
        "prompts": N,
        "settings": {
            "temperature": 0.7, "kl_temperature": 0.7, "max_new_tokens": 48,
            "seed": 1, "confidence": 0.95, "bootstrap": 100,
        },
        "kl_reference": "sft",
        "judged": ["reward", "gold"],
        "metrics": metrics,
        "comparison": {
            "candidate": "ppo",
            "baseline": "sft",
            "win_rates": {"reward": estimate(0.8, 0.05), "gold": estimate(0.6, 0.05)},
            "differences": {"reward": estimate(*reward), "gold": estimate(*gold)},
        },
        "models": {"ppo": {"parameters": 124439808.0, "size_mb": 497.759232}},
        "against_references": {
            "candidate": "ppo",
            "win_rates": {"reward": estimate(0.61, 0.04, N - 1), "gold": estimate(math.nan, math.nan, 0)},
        },
        "distributions": report.distributions(scores | trained_on, ["reward", "gold", "length_tokens"]),
        "pairs": {
            "n": 50,
            "accuracy": estimate(0.88, 0.04),
            "scores": report.distributions(
                {"chosen": {"score": np.arange(50.0)}, "rejected": {"score": np.arange(50.0) - 9}}, ["score"]
            )["score"],
        },
        "curves": {"step": [1, 2, 3], "score_mean": [0.0, 0.5, 1.0], "kl": [0.0, 2.0, 7.0]},
    }  # fmt: skip
    samples: dict[str, list[Any]] = {
        "prompt": [f"{EVIL} {i}" for i in range(N)],
        "reference": [None if i == 1 else EVIL for i in range(N)],
    }
    for name in ("base", "sft", "ppo"):
        samples[name] = [f"{name} says {i} {EVIL}" for i in range(N)]
    for name, of in scores.items():
        samples |= {f"{name}_{metric}": values.tolist() for metric, values in of.items()}
    return made_report, scores | trained_on, samples


class Reader(HTMLParser):
    """Collects tags, attributes that could load or run something, and text; notices tags that are not closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href") or name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    report.write(out, *made())
    return out


def test_writes_all_files(written: Path) -> None:
    files = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    assert files == [
        "plots/lengths.png", "plots/pairs_histogram.png", "plots/ppo_curves.png",
        "plots/scores_boxplot.png", "plots/scores_histogram.png",
        "report.html", "report.json", "samples.parquet",
    ]  # fmt: skip
    assert json.loads((written / "report.json").read_text())["metrics"]["ppo"]["kl"]["value"] == 7.25
    assert pq.read_table(written / "samples.parquet").num_rows == N


def test_the_same_input_gives_the_same_bytes_and_another_input_others(written: Path, tmp_path: Path) -> None:
    report.write(tmp_path, *made())
    for path in written.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / path.relative_to(written)).read_bytes(), path.name
    values = made()[1]["ppo"]["reward"]
    plots.boxplot(tmp_path / "one.png", {"Reward": {"ppo": values}})
    plots.boxplot(tmp_path / "other.png", {"Reward": {"ppo": values + 1}})
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_plots_ignore_the_users_style_and_leave_it_alone(written: Path, tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red"}):
        report.write(tmp_path, *made())
        assert matplotlib.rcParams["font.size"] == 40
    for path in written.glob("plots/*.png"):
        assert path.read_bytes() == (tmp_path / "plots" / path.name).read_bytes()


def test_plots_carry_no_version_or_date(written: Path) -> None:
    for path in written.glob("plots/*.png"):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert not re.search(rb"matplotlib|Software|tIME|Creation", content)


def test_page_escapes_model_text_and_loads_nothing(written: Path) -> None:
    page = (written / "report.html").read_text()
    reader = Reader(page)
    assert "script" not in reader.tags
    assert "b" not in reader.tags
    assert reader.open == []
    assert len(reader.links) == 5
    assert all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert f"ppo says 0 {EVIL}" in reader.text
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page


def test_page_says_the_summary_first_and_every_number(written: Path) -> None:
    text = " ".join(Reader((written / "report.html").read_text()).text.split())
    assert text.index("PPO is better than SFT by every score.") < text.index("Scores")
    assert "PPO wins 80 % of 40 prompts against SFT (75 % to 85 %)" in text
    assert "a change of +1.000 (95 % interval +0.800 to +1.200)" in text
    assert "KL of PPO to SFT: 7.25 nats per response (6.75 to 7.75)." in text
    assert "it scores the chosen text above the rejected one in 88 % (84 % to 92 %)" in text
    assert "Reward: PPO wins 61 % of 39 prompts against the references (57 % to 65 %)." in text
    assert "Gold: PPO wins" not in text.replace("Gold: PPO wins 60", "")  # no reference has a gold score
    assert "ppo 124439808497.76" in text
    assert f"training {''.join(map(report.number, trained_on().values()))}" in text
    assert "0.380 to 0.420; n = 39" in text  # fewer references than prompts
    shown = report.distributions(made()[1], ["reward"])["reward"]["percentiles"]["ppo"]["50"]
    assert report.number(shown) in text
    assert "nan" not in text.lower()
    assert "None" not in text


def trained_on() -> dict[str, float]:
    """The row of the reward model's training texts: percentiles, then the mean."""
    found = made()[0]["distributions"]["reward"]
    return {**found["percentiles"]["training"], "mean": found["means"]["training"]}


@pytest.mark.parametrize(
    ("reward", "gold", "expected"),
    [
        ((1.0, 0.2), (0.3, 0.1), "PPO is better than SFT by every score."),
        ((-1.0, 0.2), (-0.3, 0.1), "PPO is worse than SFT by every score."),
        ((1.0, 0.2), (-0.3, 0.1), "PPO has more reward than SFT but is worse by Gold: the reward may be over-opt"),
        ((0.1, 0.2), (0.0, 0.1), "No clear difference between PPO and SFT: the interval of each difference"),
        ((1.0, 0.2), (0.0, 0.1), "PPO against SFT: better by Reward; not clearly different by Gold."),
        ((-1.0, 0.2), (0.3, 0.1), "PPO against SFT: better by Gold; worse by Reward."),
        ((math.nan, 0.2), (math.nan, 0.1), "No clear difference"),
    ],
)
def test_verdict(reward: tuple[float, float], gold: tuple[float, float], expected: str) -> None:
    assert report.verdict(made(reward, gold)[0]).startswith(expected)


def test_verdict_without_scores_or_a_second_policy() -> None:
    made_report = made()[0]
    made_report["comparison"]["differences"] = {}
    assert report.verdict(made_report) == "PPO and SFT were not scored: there is neither a reward model nor a scorer."
    made_report["comparison"] = None
    assert "only one policy" in report.verdict(made_report)
    assert len(report.summary(made_report)) == 1  # against the references
    made_report["against_references"] = None
    assert report.summary(made_report) == []


def test_a_report_without_scores_references_and_ppo_is_still_a_page(tmp_path: Path) -> None:
    bare, scores, samples = copy.deepcopy(made())
    nothing = dict.fromkeys(("curves", "pairs", "comparison", "against_references"))
    bare |= {"judged": [], "models": {}, "kl_reference": "base", **nothing}
    bare["metrics"] = {"base": {"length_tokens": estimate(math.nan, 0.0)}}
    bare["distributions"] = report.distributions({"base": {"length_tokens": np.array([math.nan])}}, ["length_tokens"])
    report.write(tmp_path, bare, {"base": scores["base"]}, {"prompt": samples["prompt"], "base": samples["base"]})
    assert bare["distributions"] == {}
    assert not (tmp_path / "plots").exists()
    page = Reader((tmp_path / "report.html").read_text())
    assert "Length, tokens" in page.text
    assert json.loads((tmp_path / "report.json").read_text())["metrics"]["base"]["length_tokens"]["value"] is None


def test_distributions_count_every_known_value_once() -> None:
    scores = {"sft": {"gold": np.array([0.0, 1.0, 2.0, math.nan])}, "ppo": {"gold": np.array([4.0])}, "base": {}}
    found = report.distributions(scores, ["gold", "absent"], bins=4)
    assert set(found) == {"gold"}
    assert found["gold"]["edges"] == [0, 1, 2, 3, 4]
    assert found["gold"]["counts"] == {"sft": [1, 1, 1, 0], "ppo": [0, 0, 0, 1]}
    assert found["gold"]["percentiles"]["sft"]["50"] == found["gold"]["means"]["sft"] == 1
    same = report.distributions({"sft": {"gold": np.array([3.0, 3.0])}}, ["gold"])
    assert sum(same["gold"]["counts"]["sft"]) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (report.number(1.23456, 2), "1.23"),
        (report.number(-1.0, 1), "\N{MINUS SIGN}1.0"),
        (report.number(1.0, 1, sign=True), "+1.0"),
        (report.number(None), "\N{EN DASH}"),
        (report.number(math.nan), "\N{EN DASH}"),
        (report.percent(0.756), "76 %"),
        (report.percent(math.nan), "\N{EN DASH}"),
    ],
)
def test_numbers_for_people(text: str, expected: str) -> None:
    assert text == expected
