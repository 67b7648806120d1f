"""Several policies' responses to prompts of the user, side by side, with scores."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rlhf import rewards
from rlhf.config.pipeline import PipelineConfig
from rlhf.config.resources import Resources
from rlhf.errors import DataError, RewardError
from rlhf.models import loading
from rlhf.ppo import batching
from rlhf.ppo.batching import Prompts
from rlhf.ppo.checks import check_policy
from rlhf.ppo.generation import GREEDY
from rlhf.ppo.policy import Policy
from rlhf.ppo.rollout import collect
from rlhf.rewards.registry import labels
from rlhf.runs.policies import Place
from rlhf.training import computing

BATCH = 32  # prompts generated at once, unless told otherwise


class Sampling(NamedTuple):
    """How responses are drawn. Temperature 0 is greedy; all policies use the same random numbers."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Response:
    """One response; ``tokens`` counts its end-of-sequence token, which is there where ``ended``."""

    text: str
    tokens: int
    ended: bool
    scores: dict[str, float] = field(default_factory=dict)


def respond(
    place: Place,
    prompts: Sequence[str],
    sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
    resources: Resources = Resources(),  # noqa: B008 (immutable)
    *,
    stream: str = "generate",
    batch_size: int = BATCH,
) -> list[Response]:
    """What a policy answers to prompts, which it gets exactly as they are.

    Args:
        place: where the policy is.
        prompts: the texts.
        sampling: how responses are drawn.
        resources: what it computes on.
        stream: with the seed, which random numbers; those of ``evaluate`` are the evaluation's own.
        batch_size: prompts at once, which changes no response.

    Raises:
        DataError: a prompt has no token, or leaves no room for the response in the model's context.
        ModelError: the policy cannot be loaded.
    """
    device = computing.device_of(resources)
    computing.set_up_cpu(resources)
    with torch.no_grad(), computing.autocast(resources), computing.quiet():
        tokenizer = loading.load_tokenizer(place.path, **place.options)
        model = loading.load_policy(place.path, **place.options, dtype=place.dtype)
        policy = Policy(model.to(device).eval())
        check_policy(policy)
        config = policy.language_model.config
        token_ids = loading.prompt_token_ids(tokenizer, prompts, encoder=config.is_encoder_decoder)
        _check(prompts, token_ids, sampling.max_new_tokens, config, place)
        rows, made = Prompts(prompts, token_ids, {}), []
        uniforms = torch.rand(
            len(prompts), sampling.max_new_tokens, generator=batching.generator(sampling.seed, stream)
        )
        for start in range(0, len(prompts), batch_size):
            batch = range(len(prompts))[start : start + batch_size]
            rollout = collect(
                policy, tokenizer, rows.select(batch), uniforms[batch], sampling.temperature or GREEDY, device
            )
            lengths, ended = rollout.sequences.response_lengths.tolist(), rollout.ended.tolist()
            made += [Response(*one) for one in zip(rollout.responses, lengths, ended, strict=True)]
    return made


def _check(prompts: Sequence[str], token_ids: Sequence[Sequence[int]], new: int, config: Any, place: Place) -> None:
    for number, (text, ids) in enumerate(zip(prompts, token_ids, strict=True), 1):
        if not ids:
            raise DataError(f"prompt {number}, {text!r}, has no token; give it some text")
        if not loading.fits(config, len(ids), new):
            raise DataError(
                f"prompt {number} has {len(ids)} tokens, and up to {new} new ones follow: more than the context of "
                f"{config.max_position_embeddings} tokens of {place.path}. Shorten it, or lower max_new_tokens"
            )


def scorers(
    config: PipelineConfig, reward_model: Place | None, columns: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, rewards.Scorer], list[str]]:
    """The reward model, where there is one, and the configuration's functions that need no other columns than these.

    Returns:
        Scorers by name, and a note for each function that is left out.

    Raises:
        ConfigError: a function cannot be loaded.
        ModelError: the reward model cannot be loaded.
    """
    found: dict[str, rewards.Scorer] = {}
    notes = []
    if reward_model is not None:
        with computing.quiet():
            model = loading.load_reward_model(reward_model.path, **reward_model.options, dtype=reward_model.dtype)
        model.eval().to(computing.device_of(config.resources))
        found["reward"] = rewards.RewardModel(model, loading.load_tokenizer(reward_model.path, **reward_model.options))
    called = labels(config.ppo.rewards)
    named = {called[name]: spec for name, spec in config.ppo.rewards.items() if spec.function != "model"}
    for name, spec in {**(named if config.ppo.enabled else {}), **config.evaluate.scorers}.items():
        scorer = rewards.make_scorer(spec.function, spec.arguments)
        if missing := sorted(_required(scorer.function) - columns.keys() - spec.arguments.keys()):
            notes.append(f"score {name}: left out, as the prompts have no {', '.join(missing)} ({spec.function})")
        else:
            found[name] = scorer
    return found, notes


def _required(function: rewards.RewardFunction) -> set[str]:
    """The columns that a reward function cannot do without."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[2:]
    except (TypeError, ValueError):  # some built-in callables have no signature
        return set()
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name for p in parameters if p.default is p.empty and p.kind not in variable}


def score(
    by: Mapping[str, rewards.Scorer],
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[Response]],
    columns: Mapping[str, Sequence[Any]],
    resources: Resources,
) -> list[str]:
    """Put scores into the responses of all policies.

    Returns:
        A note for each scorer that failed. Its scores are left out, of all policies: they are there to be compared.
    """
    notes = []
    for name, scorer in by.items():
        try:
            with torch.no_grad(), computing.autocast(resources):
                scores = [scorer(prompts, [one.text for one in answer], columns) for answer in answers.values()]
        except RewardError as error:
            notes.append(f"score {name}: left out: {error}")
            continue
        for answer, values in zip(answers.values(), scores, strict=True):
            for response, value in zip(answer, values, strict=True):
                response.scores[name] = value
    return notes
