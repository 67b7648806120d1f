"""Candidate and champion on the same held-out prompts, judged by what neither was trained on.

The candidate's answers and their scores are in its evaluation's ``samples.parquet``. The champion's policy answers the
same prompts, with the settings and the random numbers of that evaluation, and the candidate's held-out judge scores
them. The first candidate has the policy before PPO to beat, whose answers are in the same file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rlhf import metrics, rewards
from rlhf.champions.gate import Figures, Pair
from rlhf.champions.ledger import Contender
from rlhf.config.pipeline import PipelineConfig
from rlhf.config.promotion import trained_on
from rlhf.errors import ConfigError, DataError, RlhfError
from rlhf.models import loading
from rlhf.reward.held_out_model import HELD_OUT
from rlhf.runs.generate import Sampling, respond
from rlhf.runs.policies import Place
from rlhf.statistics.intervals import Floats
from rlhf.store.artifacts import Store
from rlhf.training import computing


def hold(config: PipelineConfig, store: Store, candidate: Contender, champion: Contender | None) -> Figures | None:
    """The figures by which the gate decides; None where both have the same policy, so that nothing is to be decided.

    What keeps the contest from taking place is said in ``Figures.scores``: no judge, or a champion that cannot answer.

    Args:
        config: of the candidate's run, which has an evaluation.
        store: has the artifacts of both.
        candidate: the run that wants to be champion.
        champion: the one whose place it would take; None: there is none yet.

    Raises:
        ArtifactError: the candidate's own artifacts are gone, or damaged.
    """
    policies = [name for name in ("base", "sft", "ppo") if name == "base" or name in candidate.keys]
    if candidate.policy is None:
        return _nothing("the candidate has no trained policy: neither sft nor ppo is on")
    if "evaluate" not in candidate.keys:
        return _nothing("the candidate has no evaluation, from which the gate takes its figures: evaluate is off")
    if champion is not None and _policy_digest(store, champion) == _policy_digest(store, candidate):
        return None
    finals = _finals(store, candidate)
    samples = pq.read_table(_directory(store, candidate, "evaluate") / "samples.parquet")
    own, before = policies[-1], policies[-2]
    opponent = f"the policy before it, {before}" if champion is None else f"the champion, run {champion.run_id}"
    kl, alarm = finals.get(f"evaluate/{own}/kl", math.nan), finals.get("ppo/overoptimised", math.nan)
    try:
        name = _judge_column(config, samples, own)
        if champion is None:
            texts, scores = _texts(samples, before), _numbers(samples, f"{before}_{name}")
        else:
            texts, scores = _champions(config, store, candidate, champion, samples)
    except RlhfError as error:
        return _nothing(str(error), opponent, kl, alarm)
    rouge = _rouge(samples, _texts(samples, own), texts)
    return Figures(opponent, Pair(_numbers(samples, f"{own}_{name}"), scores), rouge, kl, alarm)


def _nothing(why: str, opponent: str = "", kl: float = math.nan, alarm: float = math.nan) -> Figures:
    return Figures(opponent, why, None, kl, alarm)


# ----------------------------------------------------------------------------------------------------------- the judge
def _judge_column(config: PipelineConfig, samples: pa.Table, policy: str) -> str:
    """The judge's name, if its scores of the candidate are there.

    Raises:
        ConfigError: there is no such judge, or PPO was trained on it.
    """
    judge = config.promotion.judge
    if problem := config.promotion.conflict(config.evaluate, config.reward, config.ppo):
        raise ConfigError(problem)
    if f"{policy}_{judge}" not in samples.column_names:
        names = [
            HELD_OUT,
            *(name for name in config.evaluate.scorers if name not in trained_on(config.evaluate, config.ppo)),
        ]
        known = [name for name in names if f"{policy}_{name}" in samples.column_names]
        raise ConfigError(
            f"promotion.judge is {judge!r}, of which the evaluation has no scores; of what PPO is not trained on it "
            f"has {', '.join(known) or 'none'}. Name one of evaluate.scorers that is no reward, or turn reward and "
            "reward.held_out on"
        )
    return judge


def _scorer(config: PipelineConfig, store: Store, candidate: Contender) -> rewards.Scorer:
    """The judge itself: the held-out reward model of the candidate's run, or the scorer of its configuration."""
    judge = config.promotion.judge
    if judge != HELD_OUT:
        spec = config.evaluate.scorers[judge]
        return rewards.make_scorer(spec.function, spec.arguments)
    path, trusted = _directory(store, candidate, "reward") / HELD_OUT, config.model.trust_remote_code
    model = loading.load_reward_model(path, trust_remote_code=trusted, dtype=config.model.dtype).eval()
    model.to(computing.device_of(config.resources))
    return rewards.RewardModel(model, loading.load_tokenizer(path, trust_remote_code=trusted))


# -------------------------------------------------------------------------------------------------------- the champion
def _champions(
    config: PipelineConfig, store: Store, candidate: Contender, champion: Contender, samples: pa.Table
) -> tuple[list[str], Floats]:
    """What the champion answers to the prompts of the candidate's evaluation, and the judge's scores of it, (n,)."""
    if champion.policy is None:
        raise ConfigError(f"the champion, run {champion.run_id}, has no trained policy")
    prompts, columns = _prompts(store, candidate, samples)
    settings, stage = config.evaluate, champion.policy[0]
    place = Place(
        str(_directory(store, champion, stage) / "model"),
        trust_remote_code=config.model.trust_remote_code,
        dtype=config.model.dtype,
    )
    sampling = Sampling(settings.max_new_tokens, settings.temperature, config.seed)
    computing.seed_everything(config.seed)  # only a scorer might draw from the global generators
    answers = respond(place, prompts, sampling, config.resources, stream="evaluate", batch_size=settings.batch_size)
    texts = [answer.text for answer in answers]
    with torch.no_grad(), computing.autocast(config.resources), computing.quiet():
        scores = _scorer(config, store, candidate)(prompts, texts, columns)
    return texts, np.array(scores, dtype=np.float64)


def _prompts(store: Store, candidate: Contender, samples: pa.Table) -> tuple[list[str], Mapping[str, Sequence[Any]]]:
    """The prompts of the candidate's evaluation, and the other columns of their rows.

    Raises:
        DataError: they are not those of its prepare artifact.
    """
    path = _directory(store, candidate, "prepare") / "prompts" / "test.parquet"
    columns = pq.read_table(path).slice(0, samples.num_rows).to_pydict()
    prompts: list[str] = columns.pop("prompt")
    if prompts != samples["prompt"].to_pylist():
        raise DataError(
            f"the prompts of the evaluation are not the first ones of {path}; run `rlhf run --from prepare`"
        )
    return prompts, columns


# --------------------------------------------------------------------------------------------------------------- files
def _directory(store: Store, contender: Contender, stage: str) -> Path:
    """The artifact of a stage of a run. Raises ArtifactError where it is gone, or damaged."""
    store.open(stage, contender.keys[stage])
    return store.path(stage, contender.keys[stage])


def _policy_digest(store: Store, contender: Contender) -> str | None:
    """The digest of its last policy, as its artifact was written; None where that is not known."""
    known = store.remembered(*contender.policy) if contender.policy else None
    return known.parts.get("model") if known else None


def _finals(store: Store, contender: Contender) -> dict[str, float]:
    manifests = (store.remembered(*place) for place in contender.keys.items())
    return {name: value for manifest in manifests if manifest for name, value in manifest.metrics.items()}


def _texts(samples: pa.Table, policy: str) -> list[str]:
    return [text or "" for text in samples[policy].to_pylist()]


def _numbers(samples: pa.Table, column: str) -> Floats:
    return np.array(samples[column].to_pylist(), dtype=np.float64)  # None becomes NaN


def _rouge(samples: pa.Table, candidate: list[str], champion: list[str]) -> Pair | None:
    """ROUGE-L of both, (n,); None without a reference."""
    references = [given or [] for given in samples["reference"].to_pylist()]
    if not any(references):
        return None
    return Pair(*(metrics.rouge(texts, references)["rougeL"] for texts in (candidate, champion)))
