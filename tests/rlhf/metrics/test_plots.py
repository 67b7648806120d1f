"""Plots and files of an evaluation: all of them, the same bytes each time, and nothing of the user's style in them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.axes import Axes

from rlhf.evaluate import output
from rlhf.metrics import plots

N = 40


def made() -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]], dict[str, list[Any]]]:
    """What ``files.write`` gets: of a report what it draws, the values behind it, and samples."""
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
    scores["training"] = {"reward": generator.normal(0.5, 2, 90)}
    sides = {"chosen": {"score": np.arange(50.0)}, "rejected": {"score": np.arange(50.0) - 9}}
    report = {
        "judged": ["reward", "gold"],
        "metrics": {"ppo": {"kl": {"value": 7.25, "low": math.nan, "high": math.inf}}},
        "distributions": output.distributions(scores, ["reward", "gold", "length_tokens"]),
        "pairs": {"n": 50, "scores": output.distributions(sides, ["score"])["score"]},
        "curves": {"step": [1, 2, 3], "score_mean": [0.0, 0.5, 1.0], "kl": [0.0, 2.0, 7.0]},
        "overoptimisation": {
            "kl": [0.0, 4.0, 1.0],
            "proxy": {"name": "reward", "value": [0.0, 2.0, 1.0], "stderr": [0.1, 0.1, 0.1]},
            "judges": {"gold": {"value": [0.0, -1.0, 0.5], "stderr": [0.1, 0.1, 0.1], "alarm": [0.0, 1.0, 0.0]}},
        },
    }
    samples: dict[str, list[Any]] = {"prompt": [f"p{i}" for i in range(N)], "reference": [["a", "b"], None] * (N // 2)}
    return report, scores, samples


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written")
    output.write(out, *made())
    return out


def test_writes_all_files(written: Path) -> None:
    found = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    assert found == [
        "plots/lengths.png", "plots/overoptimisation.png", "plots/pairs_histogram.png", "plots/ppo_curves.png",
        "plots/scores_boxplot.png", "plots/scores_histogram.png", "report.json", "samples.parquet",
    ]  # fmt: skip
    figures = json.loads((written / "report.json").read_text())["metrics"]["ppo"]["kl"]
    assert figures == {"value": 7.25, "low": None, "high": None}
    assert pq.read_table(written / "samples.parquet").to_pydict() == made()[2]


def test_the_same_input_gives_the_same_bytes_and_another_input_others(written: Path, tmp_path: Path) -> None:
    report, scores, samples = made()
    report["overoptimisation"]["judges"]["gold"]["alarm"] = [0.0, 0.0, 0.0]
    output.write(tmp_path, report, scores, samples)
    for path in written.rglob("*.*"):
        same = path.read_bytes() == (tmp_path / path.relative_to(written)).read_bytes()
        assert same == (path.name not in ("report.json", "overoptimisation.png")), path.name


def test_plots_ignore_the_users_style_and_leave_it_alone(written: Path, tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red"}):
        output.write(tmp_path, *made())
        assert matplotlib.rcParams["font.size"] == 40
    for path in written.glob("plots/*.png"):
        assert path.read_bytes() == (tmp_path / "plots" / path.name).read_bytes()


def test_plots_carry_no_version_or_date(written: Path) -> None:
    for path in written.glob("plots/*.png"):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert not re.search(rb"matplotlib|Software|tIME|Creation", content)


def test_without_scores_references_and_ppo_there_is_nothing_to_draw(tmp_path: Path) -> None:
    lengths = output.distributions({"base": {"length_tokens": np.array([math.nan])}}, ["length_tokens"])
    assert lengths == {}
    nothing = dict.fromkeys(("curves", "pairs", "overoptimisation"))
    output.write(tmp_path, {"judged": [], "distributions": lengths, **nothing}, {}, {"prompt": ["p"]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "samples.parquet"]


def test_distributions_count_every_known_value_once() -> None:
    scores = {"sft": {"gold": np.array([0.0, 1.0, 2.0, math.nan])}, "ppo": {"gold": np.array([4.0])}, "base": {}}
    found = output.distributions(scores, ["gold", "absent"], bins=4)
    assert set(found) == {"gold"}
    assert found["gold"]["edges"] == [0, 1, 2, 3, 4]
    assert found["gold"]["counts"] == {"sft": [1, 1, 1, 0], "ppo": [0, 0, 0, 1]}
    assert found["gold"]["percentiles"]["sft"]["50"] == found["gold"]["means"]["sft"] == 1
    same = output.distributions({"sft": {"gold": np.array([3.0, 3.0])}}, ["gold"])
    assert sum(same["gold"]["counts"]["sft"]) == 2


def test_over_optimisation_is_drawn_over_the_root_of_the_kl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[float], list[float], str]] = []
    plot = Axes.plot

    def spy(self: Axes, x: Any, y: Any, **options: Any) -> Any:
        drawn.append((list(map(float, x)), list(map(float, y)), options.get("marker", "")))
        return plot(self, x, y, **options)

    monkeypatch.setattr(Axes, "plot", spy)
    series = {
        "proxy": {"value": [1.0, 5.0, 2.0], "stderr": [0.5, 0.5, 0.5]},
        "judge": {"value": [0.0, -1.0, 1.0], "stderr": [math.nan, 0.25, 0.25], "alarm": [0.0, 1.0, 0.0]},
    }
    plots.overoptimisation(tmp_path / "x.png", [0.0, 9.0, 4.0], series)
    assert drawn == [
        ([0, 2, 3], [0, 2, 8], "o"),  # by distance; gains in standard errors
        ([], [], "v"),
        ([0, 2, 3], [0, 4, -4], "o"),
        ([3], [-4], "v"),
        ([], [], "v"),  # of the legend
    ]
