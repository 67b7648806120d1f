"""The sources of a report as the stages leave them: a small run in which PPO got better, made by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.config.pipeline import PipelineConfig
from rlhf.report import Sources, words
from rlhf.runs.records import RunRecord
from rlhf.store.artifacts import Manifest
from rlhf.tracking.tracker import JournalTracker

N = 40
STAGES = ("prepare", "sft", "judge", "reward", "ppo", "evaluate")
EVIL = "</script><script>alert('x')</script> & <img src=x onerror=alert(1)> \"quoted\" <!-- -->"
STRANGE = "line\u2028separator, override \u202e dne, surrogate \ud800, bell \x07, null \x00, \ufffe"
LONG = "w" * 4000


def estimate(value: float, half: float, n: int = N) -> dict[str, Any]:
    """An estimate as it is in report.json: None for NaN."""
    found = {"value": value, "low": value - half, "high": value + half}
    return {name: None if math.isnan(v) else v for name, v in found.items()} | {"n": n}


def score(difference: tuple[float, float], win_rate: float, **more: Any) -> dict[str, Any]:
    """How two policies compare by one score."""
    return {
        "win_rate": estimate(win_rate, 0.05),
        "wins": win_rate - 0.05,
        "ties": 0.1,
        "losses": 0.95 - win_rate,
        "win_rate_length_controlled": estimate(win_rate - 0.02, 0.06),
        "difference": estimate(*difference),
        "p": 0.0004 if difference[0] > difference[1] else 0.31,
        "effect": 0.42,
    } | more


def distribution(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A metric's percentiles, means and common histogram."""
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=16)
    percentiles = (5, 25, 50, 75, 95)
    return {
        "percentiles": {
            name: {str(p): float(np.percentile(of, p)) for p in percentiles} for name, of in values.items()
        },
        "means": {name: float(of.mean()) for name, of in values.items()},
        "edges": edges.tolist(),
        "counts": {name: np.histogram(of, edges)[0].tolist() for name, of in values.items()},
    }


def evaluation(
    reward: tuple[float, float] = (1.0, 0.2),
    held_out: tuple[float, float] = (0.8, 0.2),
    gold: tuple[float, float] = (0.3, 0.1),
    alarm: bool = False,
) -> dict[str, Any]:
    """report.json: gains of PPO over SFT with their half intervals, and whether the held-out judge's alarm is on."""
    draws = np.random.default_rng(0)
    means = {"base": -2.0, "sft": 0.0, "ppo": 1.0, "reference": 0.2}
    values = {
        metric: {name: draws.normal(mean * scale, scale, N) for name, mean in means.items()}
        for metric, scale in (("reward", 1.0), ("held_out", 0.9), ("gold", 0.3))
    }
    lengths = {name: draws.integers(5, 40, N).astype(float) for name in means}
    metrics = {
        name: {metric: estimate(float(of[name].mean()), 0.1) for metric, of in values.items()}
        | {"length_tokens": estimate(float(lengths[name].mean()), 1.5), "eos_rate": estimate(0.95, 0.05)}
        for name in means
    }
    for name in ("base", "sft", "ppo"):
        kl = estimate(7.25 if name == "ppo" else 0.0, 0.5) | {"stderr": 0.26}
        metrics[name] |= {"kl": kl, "rougeL": estimate(0.4, 0.02, N - 1), "chrf": estimate(51.0, 1.5)}
    metrics["reference"]["gold"] = estimate(math.nan, math.nan, 0)
    scores = {"reward": score(reward, 0.8), "held_out": score(held_out, 0.72), "gold": score(gold, 0.6)}
    judges = {
        "brevity": {
            "win_rate": estimate(0.55, 0.07), "wins": 0.5, "ties": 0.1, "losses": 0.4,
            "consistency": 0.9, "shown_first_share": 0.52,
        }
    }  # fmt: skip
    plain = {"rougeL": {"difference": estimate(0.02, 0.03), "p": 0.2, "effect": 0.1}}
    pairs = [("ppo", "sft"), ("ppo", "base"), ("ppo", "reference"), ("sft", "base")]
    return {
        "prompts": N,
        "settings": {
            "temperature": 0.7, "kl_temperature": 0.7, "max_new_tokens": 48,
            "seed": 1, "confidence": 0.95, "bootstrap": 100,
        },
        "kl_reference": "sft",
        "judged": ["reward", "held_out", "gold"],
        "trained_on": ["reward"],
        "metrics": metrics,
        "models": {
            name: {"parameters": 124439808.0, "size_mb": 497.759232, "trainable": 294912.0}
            for name in ("base", "sft", "ppo", "reward", "held_out")
        },
        "distributions": {
            "reward": distribution(values["reward"] | {"training": draws.normal(0.5, 2, 90)}),
            "held_out": distribution(values["held_out"]),
            "gold": distribution({name: of for name, of in values["gold"].items() if name != "reference"}),
            "length_tokens": distribution(lengths),
        },
        "pairs": {
            "n": 50,
            "accuracy": estimate(0.88, 0.04),
            "scores": distribution({"chosen": np.arange(50.0), "rejected": np.arange(50.0) - 9}),
        },
        "curves": {"step": [1, 2, 3], "score_mean": [0.0, 0.5, 1.0], "kl": [0.0, 2.0, 7.0]},
        "comparisons": [
            {"candidate": new, "baseline": old, "scores": scores, "judges": judges, "metrics": plain}
            for new, old in pairs
        ],
        "overoptimisation": {
            "update": [0, 10, 20, 30],
            "kl": [0.0, 1.0, 4.0, 7.2],
            "proxy": {"name": "reward", "value": [0.0, 0.5, 0.8, 1.0], "stderr": [0.05, 0.05, 0.06, 0.06]},
            "judges": {
                "held_out": {
                    "value": [0.0, 0.4, 0.5, 0.2 if alarm else 0.8], "stderr": [0.05, 0.05, 0.05, 0.06],
                    "alarm": [0, 0, 0, int(alarm)],
                },
                "gold": {"value": [0.6, 0.7, None, 0.9], "stderr": [0.02, 0.02, None, 0.02], "alarm": [0, 0, 0, 0]},
            },
        },
    }  # fmt: skip


PREPARED = {
    "vocab_size": 512,
    "demonstrations": {
        "rows": 9000, "lost": {"duplicate": 12, "over_limit": 8000, "too_long": 0}, "kept": 988,
        "written_to": "demonstrations", "splits": {"train": 800, "validation": 90, "test": 98},
        "tokens": {"prompt": {"min": 74, "mean": 101.05, "p50": 101.0, "p95": 116.05, "max": 121}},
    },
    "preferences": {
        "rows": 5000, "lost": {"duplicate": 0, "over_limit": 0, "too_long": 7}, "kept": 4993,
        "written_to": "preferences", "splits": {"train": 4000, "validation": 400, "test": 593}, "tokens": {},
    },
}  # fmt: skip


def calibration() -> dict[str, Any]:
    """reward/calibration.json, with what the page reads of it."""
    bins = [{"confidence": c, "right": c - 0.03, "low": c - 0.09, "high": c + 0.03, "pairs": 60} for c in
            (0.1, 0.3, 0.5, 0.7, 0.9)]  # fmt: skip
    by_length = [{"chosen": "about_equal", "tokens_from": -6, "tokens_to": 5, **estimate(0.9, 0.03, 80)}]
    return {
        "objective": "pairwise",
        "pairs": {
            "pairs": 300, "accuracy": estimate(0.88, 0.04, 300), "by_length": by_length,
            "calibration": {"error": 0.031, "error_if_calibrated": 0.024, "bins": bins},
        },
    }  # fmt: skip


def config(**more: Any) -> PipelineConfig:
    """The configuration of the run."""
    data = {"demonstrations": "d.jsonl", "preferences": "p.jsonl"}
    sections: dict[str, Any] = {"name": "made-by-hand", "data": data, "model": {"init": "random"}}
    return PipelineConfig.model_validate(sections | {"ppo": {"kl_coef": 0.4, "eval_every": 10}} | more)


def samples(count: int = N, text: str = f"{EVIL} {STRANGE} {LONG[:300]}") -> dict[str, list[Any]]:
    """samples.parquet; Parquet has no lone surrogates, and an answer without a score is None."""
    draws = np.random.default_rng(1)
    text = text.encode("utf-8", "ignore").decode()
    columns: dict[str, list[Any]] = {"prompt": [f"prompt {i} {text}" for i in range(count)]}
    columns["reference"] = [None if i == 1 else [f"first {i}", "second"] for i in range(count)]
    for name in ("base", "sft", "ppo"):
        columns[name] = [f"the {name} says {i} {text}" for i in range(count)]
    for name in ("base", "sft", "ppo", "reference"):
        for metric in ("reward", "held_out", "gold"):
            columns[f"{name}_{metric}"] = draws.normal(0, 1, count).tolist()
    return columns


def sources(folder: Path, report: Mapping[str, Any] | None = None, table: Mapping[str, Any] | None = None) -> Sources:
    """Write what the stages leave below ``folder``, and say where it is."""
    directories = {stage: folder / stage for stage in STAGES}
    for directory in directories.values():
        directory.mkdir(parents=True, exist_ok=True)
    _write(directories["evaluate"] / "report.json", evaluation() if report is None else report)
    pq.write_table(pa.table(dict(samples() if table is None else table)), directories["evaluate"] / "samples.parquet")
    _write(directories["prepare"] / "report.json", PREPARED)
    _write(directories["reward"] / "calibration.json", calibration())
    curves = {
        "sft": ("loss", "grad_norm", "learning_rate"),
        "reward": ("loss", "accuracy"),
        "ppo": ("score_mean", "kl", "entropy", "ratio_max", "eval/judge/gold", "eval/judge/gold_stderr"),
    }
    for stage, names in curves.items():
        tracker = JournalTracker(directories[stage] / "metrics.jsonl")
        for step in range(1, 31):
            values = {f"{stage}/{name}": math.exp(-step / 10) + number for number, name in enumerate(names)}
            tracker.log(values | ({f"{stage}/validation_loss": 0.5} if step % 10 == 0 else {}), step)
    manifests = {stage: manifest(stage) for stage in STAGES}
    record = RunRecord(
        "20260101-000000-abcdef", "made-by-hand", "done", 1767225600.0, 1767225900.0,
        stages={stage: {"key": stage * 2, "digest": "d", "cached": stage == "sft", "seconds": 3.0} for stage in STAGES},
        config=config().model_dump(mode="json"),
    )  # fmt: skip
    return Sources(record, config(), manifests, directories)


def manifest(stage: str) -> Manifest:
    """What is said of a stage's artifact."""
    number = STAGES.index(stage)
    inputs = {f"input {source}/model": "0" * 64 for source in STAGES[:number] if source in ("prepare", "sft", "reward")}
    libraries = {"library torch": "2.13.0", "library numpy": "2.4.0" if stage == "sft" else "2.4.1"}
    files = {"model/weights": {"size": 1_000_000 * (number + 1), "sha256": "0" * 64, "mtime_ns": 0}}
    metrics = {"sft/trainable_parameters": 294912.0} if stage == "sft" else {}
    return Manifest(
        stage, f"{number}" * 32, f"{number}" * 64, {}, files, inputs | libraries | {"data.d.jsonl": "ab" * 32},
        "made-by-hand", metrics, "20260101-000000-abcdef", "cpu", 0.0, 12.5 * (number + 1),
    )  # fmt: skip


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")


class Reader(HTMLParser):
    """Collects tags, attributes that could load or run something, and text; notices tags that are not closed."""

    VOID = ("meta", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]
        self.handlers += [name for name, _ in attrs if name.startswith("on") or name == "style"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    @property
    def line(self) -> str:
        """All text, on one line."""
        return " ".join(self.text.replace(words.NBSP, " ").split())
