"""Scores over processes are the same numbers, and a process that fails says so."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from rlhf import metrics
from rlhf.metrics import parallel

PREDICTIONS = ["the cat sat", "", "a dog barks. It is loud.", "\ud83d", "你好", "x y z", "the mat"]
REFERENCES = ["the cat sat on the mat", "a", ["a dog barked", "dogs bark"], [], "你好", "", ["on the mat", ""]]


@pytest.mark.parametrize(("examples", "processes"), [(7, 3), (2, 9)])
def test_the_number_of_processes_changes_no_number(examples: int, processes: int) -> None:
    alone = metrics.score_texts(PREDICTIONS[:examples], REFERENCES[:examples], processes=1)
    spread = metrics.score_texts(PREDICTIONS[:examples], REFERENCES[:examples], processes=processes)
    assert list(alone.values) == list(spread.values)
    for name, values in alone.values.items():
        np.testing.assert_array_equal(spread.values[name], values, err_msg=name)
    np.testing.assert_array_equal(spread.bleu, alone.bleu)
    np.testing.assert_array_equal(spread.chrf, alone.chrf)


def test_few_texts_start_no_process_and_many_do(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def spread(parts: list[object]) -> list[parallel.TextScores]:
        started.append(len(parts))
        return [parallel._scores(*part) for part in parts]  # type: ignore[misc]

    monkeypatch.setattr(parallel, "_in_processes", spread)
    monkeypatch.setattr(parallel, "_cores", lambda: 3)
    metrics.text_scores(PREDICTIONS, REFERENCES)
    assert started == []
    monkeypatch.setattr(parallel, "WORTH_A_PROCESS", 5)
    metrics.text_scores(PREDICTIONS, REFERENCES)
    assert started == [3]


def test_a_process_that_ends_early_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_WORKER", "raise SystemExit(7)")
    with pytest.raises(RuntimeError, match="exit code 7"):
        metrics.text_scores(PREDICTIONS, REFERENCES, processes=2)


def test_a_worker_imports_no_torch_and_no_evaluate() -> None:
    code = "import sys, rlhf.metrics.parallel; print(*{'torch', 'datasets', 'evaluate'} & sys.modules.keys())"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


def test_predictions_and_references_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="shorter"):
        metrics.text_scores(["a"], [])
