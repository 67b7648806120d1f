"""The figures of an evaluation: each metric with its interval, and policies compared prompt by prompt.

Shapes: n prompts, R resamples (see ``rlhf.statistics.intervals``). All bootstraps draw the same resamples of the n
prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf import metrics
from rlhf.evaluate.answers import Answers
from rlhf.judge.judges import Judged
from rlhf.metrics import TextScores
from rlhf.statistics import intervals
from rlhf.statistics.intervals import Floats, Statistic

Figures = dict[str, Any]
REFERENCE = "reference"  # the references, beside the policies
HEADLINES = ("rougeL", "kl", "perplexity", "length_tokens")  # besides the scores: metrics whose bounds are finals too


class Sure(NamedTuple):
    """Level and number of resamples of all intervals, and their seed."""

    confidence: float
    resamples: int
    seed: int


class Corpus(NamedTuple):
    """A metric of all responses together: its statistic over n prompts, on which of them (n,) it stands, its range."""

    statistic: Statistic
    known: NDArray[np.bool_]
    limits: tuple[float, float]

    def on(self, rows: NDArray[np.int64]) -> Statistic:
        """The same statistic of some of the prompts only."""
        n = len(self.known)
        if len(rows) == n:
            return self.statistic

        def of_some(counts: NDArray[np.int64]) -> Floats:
            every = np.zeros((len(counts), n), dtype=np.int64)
            every[:, rows] = counts
            return self.statistic(every)

        return of_some


class Measured(NamedTuple):
    """All that is known of a policy's answers: values (n,) by metric, and metrics of the corpus."""

    values: Mapping[str, Floats]
    corpus: Mapping[str, Corpus]


def measured(answer: Answers, counted: TextScores | None) -> Measured:
    """What one policy's figures are made of; ``counted`` is what was counted against references."""
    texts = [text or "" for text in answer.texts]
    there = np.array([text is not None for text in answer.texts])
    corpus = {
        f"distinct{order}": Corpus(_remembered(metrics.distinct(texts, order)), there, (0.0, 1.0)) for order in (1, 2)
    }
    if counted is not None:
        corpus["bleu"] = Corpus(_remembered(metrics.bleu_statistic(counted.bleu)), _filled(counted.bleu), (0.0, 100.0))
        corpus["chrf"] = Corpus(metrics.chrf_statistic(counted.chrf), _filled(counted.chrf), (0.0, 100.0))
    if answer.nll is not None:
        statistic = perplexity(answer.nll, answer.values["length_tokens"])
        corpus["perplexity"] = Corpus(statistic, there, (1.0, np.inf))
    return Measured(answer.values, corpus)


def _remembered(statistic: Statistic) -> Statistic:
    """The same statistic, computed once for the same resamples: those of the interval serve the comparisons, too."""
    known: dict[bytes, Floats] = {}

    def remembering(counts: NDArray[np.int64]) -> Floats:
        digest = hashlib.blake2b(counts.tobytes()).digest()
        if digest not in known:
            known[digest] = statistic(counts)
        return known[digest]

    return remembering


def _filled(counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows have something: those with a reference."""
    filled: NDArray[np.bool_] = np.count_nonzero(counts, axis=1) > 0
    return filled


def perplexity(nll: Floats, tokens: Floats) -> Statistic:
    """exp of the mean negative log-likelihood of a token, over all tokens of the corpus.

    ``nll`` (n,) and ``tokens`` (n,) are sums over each response.
    """
    return lambda counts: np.exp((counts @ nll) / (counts @ tokens))


def estimates(of: Measured, sure: Sure) -> Figures:
    """Every metric with its interval; the KL also with its standard error."""
    found: Figures = {}
    for name, values in of.values.items():
        found[name] = intervals.bootstrap_interval(values, *sure)._asdict()
    if "kl" in found:
        found["kl"]["stderr"] = intervals.standard_error(of.values["kl"])
    for name, corpus in of.corpus.items():
        rows = np.flatnonzero(corpus.known)
        found[name] = intervals.corpus_bootstrap(corpus.on(rows), len(rows), *sure, limits=corpus.limits)._asdict()
    return found


# --- comparisons ----------------------------------------------------------------------------------------------------


def pairs(answered: Sequence[str]) -> list[tuple[str, str]]:
    """Who is compared with whom: the last policy with each one before it and with the references, then the others.

    The first of a pair is the one from which an improvement is expected.
    """
    policies = [name for name in answered if name != REFERENCE]
    *before, last = policies
    found = [(last, name) for name in reversed(before)]
    found += [(last, REFERENCE)] if REFERENCE in answered else []
    return found + [(later, earlier) for earlier, later in pairwise(before)]


def compared(
    pair: tuple[str, str],
    all_measured: Mapping[str, Measured],
    judged: Sequence[str],
    verdicts: Mapping[str, Judged],
    sure: Sure,
) -> Figures:
    """One policy against another on the same prompts: by each score, by each judge, and by every other metric."""
    one, other = (all_measured[name] for name in pair)
    longer = one.values["length_tokens"] - other.values["length_tokens"]
    both = {name: (of, other.values[name]) for name, of in one.values.items() if name in other.values}
    of_metrics = {name: _differing(*two, sure) for name, two in both.items() if name not in judged}
    for name, corpus in one.corpus.items():
        if name in other.corpus:
            of_metrics[name] = _corpora_differing(corpus, other.corpus[name], sure)
    return {
        "candidate": pair[0],
        "baseline": pair[1],
        "scores": {name: _scored(*both[name], longer, sure) for name in judged},
        "judges": {name: _preferred(verdict, sure) for name, verdict in verdicts.items()},
        "metrics": dict(sorted(of_metrics.items())),
    }


def _scored(one: Floats, other: Floats, longer: Floats, sure: Sure) -> Figures:
    wins = 0.5 + 0.5 * np.sign(one - other)
    return {
        "win_rate": intervals.win_rate(one, other, *sure)._asdict(),
        **intervals.win_shares(one, other)._asdict(),
        "win_rate_length_controlled": intervals.length_controlled_win_rate(wins, longer, *sure)._asdict(),
        **_differing(one, other, sure),
    }


def _preferred(verdict: Judged, sure: Sure) -> Figures:
    margins = verdict.margins
    none = np.zeros(len(margins))
    return {
        "win_rate": intervals.win_rate(margins, none, *sure)._asdict(),
        **intervals.win_shares(margins, none)._asdict(),
        **verdict.position_bias(),
    }


def _differing(one: Floats, other: Floats, sure: Sure) -> Figures:
    difference = intervals.paired_difference(one, other, *sure)
    return {
        "difference": difference._asdict(),
        **intervals.paired_test(one, other, sure.resamples, sure.seed)._asdict(),
    }


def _corpora_differing(one: Corpus, other: Corpus, sure: Sure) -> Figures:
    """A corpus has one value, so that there is no effect size."""
    rows = np.flatnonzero(one.known & other.known)
    found = intervals.paired_corpus_difference(one.on(rows), other.on(rows), len(rows), *sure)
    return {"difference": found.difference._asdict(), "p": found.p, "effect": np.nan}


# --- finals ---------------------------------------------------------------------------------------------------------


def finals(report: Figures) -> dict[str, float]:
    """The final metrics of a report, by the names that ``rlhf.evaluate.run`` lists; what is undefined is left out."""
    found: dict[str, float] = {}

    def add(name: str, estimate: Mapping[str, float], bounds: bool = True) -> None:
        found[name] = estimate["value"]
        if bounds:
            found.update({f"{name}_low": estimate["low"], f"{name}_high": estimate["high"]})
        if "stderr" in estimate:
            found[f"{name}_stderr"] = estimate["stderr"]

    for policy, of in report["metrics"].items():
        for metric, estimate in of.items():
            add(f"evaluate/{policy}/{metric}", estimate, metric in HEADLINES or metric in report["judged"])
    _add_comparisons(report["comparisons"], [name for name in report["metrics"] if name != REFERENCE], add, found)
    for name, size in report["models"].items():
        found |= {f"evaluate/{kind}/{name}": value for kind, value in size.items()}
    means = report["distributions"].get("reward", {"means": {}})["means"]
    found |= {"evaluate/training/reward": means["training"]} if "training" in means else {}
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def _add_comparisons(
    comparisons: Sequence[Figures], policies: Sequence[str], add: Callable[..., None], found: dict[str, float]
) -> None:
    """Of the last policy against the one before it; its win rates against the base and the references, too."""
    for one in comparisons:
        if one["candidate"] != policies[-1]:
            continue
        kinds = []
        if one["baseline"] == REFERENCE:
            kinds.append("win_rate_against_references")
        elif one["baseline"] == policies[-2]:
            kinds.append("win_rate")
            for score, of in one["scores"].items():
                add(f"evaluate/difference/{score}", of["difference"])
                add(f"evaluate/win_rate_length_controlled/{score}", of["win_rate_length_controlled"])
                found[f"evaluate/p_value/{score}"] = of["p"]
        if one["baseline"] == "base":
            kinds.append("win_rate_against_base")
        for kind in kinds:
            for name, of in (one["scores"] | one["judges"]).items():
                add(f"evaluate/{kind}/{name}", of["win_rate"])
