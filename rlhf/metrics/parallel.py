"""All text metrics of many examples at once, over the cores of the machine. No number depends on how many."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlhf.metrics import text
from rlhf.metrics.text import References

Number = TypeVar("Number", bound=np.generic)
Floats = NDArray[np.float64]

WORTH_A_PROCESS = 1_000_000  # characters of predictions: some 10 s of work, where a process takes 2 s to begin
_ROOT = Path(__file__).parents[2]
_WORKER = f"from {__name__} import work; work()"


class TextScores(NamedTuple):
    """Text metrics of n examples against their references.

    ``values``: the per-example metrics by name, each (n,), NaN where undefined: rouge1, rouge2, rougeL, rougeLsum,
    sentence_bleu, sentence_chrf, meteor. ``bleu`` (n, 10) and ``chrf`` (n, 18): the counts that corpus BLEU and corpus
    chrF are made of.
    """

    values: dict[str, Floats]
    bleu: NDArray[np.int64]
    chrf: NDArray[np.int64]


def score_texts(predictions: Sequence[str], references: References, processes: int | None = None) -> TextScores:
    """All text metrics of ``predictions``, each against its reference or references.

    Without ``processes``, as many as there are cores and a million characters for each; up to one million this
    process does it.

    Raises:
        RuntimeError: a worker process ended early; it has said why on standard error.
    """
    if processes is None:
        processes = min(_cores(), sum(map(len, predictions)) // WORTH_A_PROCESS)
    if processes < 2 or len(predictions) < 2:
        return _scores(predictions, references)
    parts = [slice(first, None, processes) for first in range(min(processes, len(predictions)))]
    done = _in_processes([(list(predictions[part]), list(references[part])) for part in parts])
    return TextScores(
        {name: _woven([scores.values[name] for scores in done]) for name in done[0].values},
        _woven([scores.bleu for scores in done]),
        _woven([scores.chrf for scores in done]),
    )


def text_scores(predictions: Sequence[str], references: References, processes: int | None = None) -> dict[str, Floats]:
    """The per-example metrics of ``score_texts``, each (n,)."""
    return score_texts(predictions, references, processes).values


def work() -> None:
    """What a worker process does: examples from standard input, scores to standard output."""
    pickle.dump(_scores(*pickle.load(sys.stdin.buffer)), sys.stdout.buffer)


def _scores(predictions: Sequence[str], references: References) -> TextScores:
    bleu, chrf = text.bleu_statistics(predictions, references), text.chrf_statistics(predictions, references)
    values = text.rouge(predictions, references)
    values |= {"sentence_bleu": text.sentence_bleu(bleu), "sentence_chrf": text.sentence_chrf(chrf)}
    values["meteor"] = text.meteor(predictions, references)
    return TextScores(values, bleu, chrf)


def _in_processes(parts: list[tuple[list[str], list[str | Sequence[str]]]]) -> list[TextScores]:
    """The scores of each part, from a process of its own.

    `multiprocessing` would import the main module again in each of them, which for a script without a guard is to run
    it. Files without a name carry the data, so that nothing is left where this process is killed.
    """
    with ExitStack() as stack:
        answers, workers = [], []
        for part in parts:
            question, answer = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            pickle.dump(part, question)
            question.seek(0)
            answers.append(answer)
            workers.append(stack.enter_context(_worker(question, answer)))
            stack.callback(workers[-1].kill)  # does nothing to one that has ended
        for worker, answer in zip(workers, answers, strict=True):
            if code := worker.wait():
                raise RuntimeError(f"a process that computes text metrics ended with exit code {code}")
            answer.seek(0)
        return [pickle.load(answer) for answer in answers]


def _worker(question: IO[bytes], answer: IO[bytes]) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _WORKER], stdin=question, stdout=answer, env={**os.environ, "PYTHONPATH": path}
    )


def _woven(parts: list[NDArray[Number]]) -> NDArray[Number]:
    """Rows taken in turn from each part, as the examples were dealt out."""
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    for first, part in enumerate(parts):
        whole[first :: len(parts)] = part
    return whole


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
