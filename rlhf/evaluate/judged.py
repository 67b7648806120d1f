"""What is said of the answers: scores of reward models and functions, metrics of texts, and verdicts of judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhf import metrics, rewards
from rlhf.config import promotion
from rlhf.config.pipeline import PipelineConfig
from rlhf.context import Context
from rlhf.evaluate.answers import Answers, HeldOut, size
from rlhf.judge.judges import ByComparison, Judged
from rlhf.metrics import TextScores
from rlhf.metrics.labels import COMPONENT
from rlhf.models import loading
from rlhf.rewards.registry import labels
from rlhf.statistics.intervals import Floats
from rlhf.training import computing

REWARD_MODELS = {"reward": "reward/model", "held_out": "reward/held_out"}


class Functions(NamedTuple):
    """The functions of a configuration by name: scores, the rewards of PPO that are not among them, and judges."""

    scorers: dict[str, rewards.FunctionScorer]
    components: dict[str, rewards.FunctionScorer]
    judges: dict[str, ByComparison]


def functions(config: PipelineConfig) -> Functions:
    """All functions, loaded.

    Raises:
        ConfigError: one cannot be loaded.
    """
    scorers = {
        name: rewards.make_scorer(spec.function, spec.arguments) for name, spec in config.evaluate.scorers.items()
    }
    called = labels(config.ppo.rewards)
    parts = {
        COMPONENT + called[name]: rewards.make_scorer(spec.function, spec.arguments)
        for name, spec in config.ppo.rewards.items()
        if config.ppo.enabled and spec.function != "model"
    }
    components = {name: scorer for name, scorer in parts.items() if scorer not in scorers.values()}
    judges = {
        name: ByComparison(rewards.load_function(function), function, f"evaluate.judges.{name}")
        for name, function in config.evaluate.judges.items()
    }
    return Functions(scorers, components, judges)


def trained_on(config: PipelineConfig, judged: Sequence[str]) -> list[str]:
    """Those of the scores that PPO was trained on."""
    same = promotion.trained_on(config.evaluate, config.ppo)
    if config.ppo.enabled and config.ppo.uses_model:
        same = ["reward", *same]
    return [name for name in judged if name in same]


def score(
    context: Context, rows: HeldOut, answers: Mapping[str, Answers], by: Functions
) -> dict[str, dict[str, float]]:
    """Put all scores into the values of the answers, (n,) each, NaN where there is no text.

    Returns:
        The sizes of the reward models: the one of PPO and the held-out one, as far as they are there.

    Raises:
        RewardError: a function failed.
        ModelError: a reward model cannot be loaded.
    """
    sizes = {
        name: _score_by_model(context, name, rows, answers)
        for name, place in REWARD_MODELS.items()
        if context.has(place)
    }
    for name, scorer in (by.scorers | by.components).items():
        for answer in answers.values():
            answer.values[name] = _scores(scorer, rows, answer.texts)
    return sizes


def _score_by_model(context: Context, name: str, rows: HeldOut, answers: Mapping[str, Answers]) -> dict[str, float]:
    """Scores of a reward model, which leaves the memory at the end; its size."""
    path, trusted = context.input(REWARD_MODELS[name]), context.config.model.trust_remote_code
    model = loading.load_reward_model(path, trust_remote_code=trusted, dtype=context.config.model.dtype)
    model.eval().to(computing.device_of(context.config.resources))
    scorer = rewards.RewardModel(model, loading.load_tokenizer(path, trust_remote_code=trusted))
    for answer in answers.values():
        answer.values[name] = _scores(scorer, rows, answer.texts)
    return size(model)


def _scores(scorer: rewards.Scorer, rows: HeldOut, texts: Sequence[str | None]) -> Floats:
    known = [row for row, text in enumerate(texts) if text is not None]
    asked = rows.prompts.select(known)
    values = np.full(len(texts), np.nan)
    values[known] = scorer(asked.texts, [texts[row] or "" for row in known], asked.columns)
    return values


def measure(rows: HeldOut, answers: Mapping[str, Answers]) -> dict[str, TextScores]:
    """Put the metrics of texts into the values of the answers, (n,) each.

    Returns:
        Of each policy, what was counted against the references; nothing where no prompt has one.
    """
    for answer in answers.values():
        answer.values.update(_by_themselves(answer.texts, rows.targets))
    policies = [name for name in answers if name != "reference"]
    if not any(rows.references):
        return {}
    texts = [text or "" for name in policies for text in answers[name].texts]
    found, n = metrics.score_texts(texts, rows.references * len(policies)), len(rows.references)
    parts = {}
    for number, name in enumerate(policies):
        part = slice(number * n, (number + 1) * n)
        values = {metric: of[part] for metric, of in found.values.items()}
        answers[name].values.update(values)
        parts[name] = TextScores(values, found.bleu[part], found.chrf[part])
    return parts


def _by_themselves(texts: Sequence[str | None], targets: Floats | None) -> dict[str, Floats]:
    """Lengths in words, and self-BLEU."""
    known = np.array([text is not None for text in texts])
    there = [text for text in texts if text is not None]
    found = {"length_words": metrics.word_lengths(there), "self_bleu": metrics.self_bleu(there)}
    if targets is not None:
        found["length_error"] = metrics.length_error(there, targets[known])
        found["length_exact"] = metrics.length_exact(there, targets[known])
    values = {name: np.full(len(texts), np.nan) for name in found}
    for name, of in found.items():
        values[name][known] = of
    return values


def verdicts(judge: ByComparison, rows: HeldOut, one: Answers, other: Answers) -> Judged:
    """What a judge says of each prompt's two answers, asked in both orders; prompts that lack one are left out.

    Raises:
        RewardError: its function failed.
    """
    pairs = zip(one.texts, other.texts, strict=True)
    known = {row: (a, b) for row, (a, b) in enumerate(pairs) if a is not None and b is not None}
    asked = rows.prompts.select(list(known))
    firsts, seconds = ([pair[side] for pair in known.values()] for side in (0, 1))
    return judge.compare(asked.texts, firsts, seconds, asked.columns)
