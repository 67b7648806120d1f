"""What each policy answers to the held-out prompts, and what the policies themselves say about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config.evaluate import Evaluate
from rlhf.context import Context
from rlhf.errors import ConfigError, DataError, did_you_mean
from rlhf.models import loading
from rlhf.ppo import batching
from rlhf.ppo.batching import Prompts
from rlhf.ppo.checks import check_policy
from rlhf.ppo.generation import GREEDY
from rlhf.ppo.policy import Policy, exact_kl
from rlhf.ppo.rollout import collect, per_token
from rlhf.ppo.sequences import Sequences
from rlhf.statistics.intervals import Floats
from rlhf.training import computing

TOKENS_AT_ONCE = 16384  # of a forward pass for KL and NLL, padding included


class HeldOut(NamedTuple):
    """The n rows to evaluate on, the references of each, none or several, and how many words each response should have.

    ``targets`` (n,) is None where the configuration names no column of them.
    """

    prompts: Prompts
    references: list[list[str]]
    targets: Floats | None


class Answers(NamedTuple):
    """One text for each of n prompts (None: there is none), values (n,) by metric, and the size of what wrote them.

    ``nll`` (n,) is the negative log-likelihood of each response under the reference policy, in nats, its
    end-of-sequence token included; None where nobody sampled it.
    """

    texts: Sequence[str | None]
    values: dict[str, Floats]
    nll: Floats | None = None
    size: dict[str, float] | None = None


def held_out(context: Context) -> HeldOut:
    """The first held-out prompts.

    Raises:
        DataError: there is none, or a target length is no number.
        ConfigError: they have no column ``evaluate.length_column``.
    """
    path = context.input("prepare/prompts/test.parquet")
    table = pq.read_table(path).slice(0, context.config.evaluate.prompts)
    if not table.num_rows:
        raise DataError(f"{path}: there is no held-out prompt; raise data.test_fraction or leave evaluate out")
    columns = table.to_pydict()
    texts = columns.pop("prompt")
    encoder = loading.is_encoder_decoder(context.sft_model(), **context.model_options(context.sft_model()))
    token_ids = loading.prompt_token_ids(tokenizer(context), texts, encoder=encoder)
    none = [None] * len(texts)
    given = zip(columns.get("references", none), columns.get("reference", none), strict=True)
    references = [[text for text in several or [one] if text and text.strip()] for several, one in given]
    return HeldOut(Prompts(texts, token_ids, columns), references, _targets(columns, context.config.evaluate))


def _targets(columns: dict[str, list[Any]], settings: Evaluate) -> Floats | None:
    """How many words each response should have, (n,); NaN where the column has null."""
    name = settings.length_column
    if name is None:
        return None
    if name not in columns:
        raise ConfigError(
            f"evaluate.length_column is {name!r}, but the prompts have no such column; they have "
            f"{', '.join(map(repr, columns)) or 'none beside the prompt'}{did_you_mean(name, columns)}"
        )
    for row, value in enumerate(columns[name]):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        if value is not None and not number:
            raise DataError(
                f"evaluate.length_column {name!r}: held-out prompt {row + 1} has {value!r} there; must be a number of "
                "words, or null for a prompt that wants none"
            )
    return np.array(columns[name], dtype=np.float64)


def tokenizer(context: Context) -> PreTrainedTokenizerBase:
    """The tokenizer of all policies."""
    return loading.load_tokenizer(context.sft_model(), **context.model_options(context.sft_model()))


def of_policies(context: Context, rows: HeldOut, device: torch.device) -> dict[str, Answers]:
    """What each policy answers, with lengths, and KL and NLL by the policy that PPO is held near (``reference``).

    Raises:
        ModelError: a policy cannot be loaded.
        DataError: a prompt leaves no room for a response.
    """
    paths = {"base": context.base_model(), "sft": context.sft_model(), "ppo": context.policy_model()}
    paths = {name: path for name, path in paths.items() if name == "base" or name in context.inputs}
    reading = tokenizer(context)
    reference = _policy(context, context.sft_model(), device)
    answers = {}
    for number, (name, path) in enumerate(paths.items()):
        policy = reference if path == context.sft_model() else _policy(context, path, device)
        answers[name] = _answers(context, policy, reference, reading, rows.prompts)
        context.tracker.progress(number + 1, len(paths))
    return answers


def _policy(context: Context, path: str, device: torch.device) -> Policy:
    model = loading.load_policy(path, **context.model_options(path), dtype=context.config.model.dtype)
    policy = Policy(model.to(device).eval())
    check_policy(policy)
    return policy


def _answers(
    context: Context, policy: Policy, reference: Policy, reading: PreTrainedTokenizerBase, prompts: Prompts
) -> Answers:
    settings = context.config.evaluate
    _check_room(policy, prompts, settings.max_new_tokens)
    # Row i's draws are the same for every policy and every batch size.
    source = batching.generator(context.config.seed, "evaluate")
    uniforms = torch.rand(len(prompts), settings.max_new_tokens, generator=source)
    kl = partial(exact_kl, policy, reference, settings.temperature or 1.0)
    texts: list[str] = []
    values: dict[str, list[Tensor]] = {"length_tokens": [], "eos_rate": [], "kl": [], "nll": []}
    for start in range(0, len(prompts), settings.batch_size):
        rows = range(len(prompts))[start : start + settings.batch_size]
        device = policy.language_model.device
        made = collect(policy, reading, prompts.select(rows), uniforms[rows], settings.temperature or GREEDY, device)
        texts += made.responses
        values["length_tokens"].append(made.sequences.response_lengths)
        values["eos_rate"].append(made.ended)
        values["kl"].append(_sums(kl, made.sequences))
        values["nll"].append(_sums(partial(_nll, reference), made.sequences))
    known = {name: torch.cat(parts).double().cpu().numpy() for name, parts in values.items()}
    return Answers(texts, known, known.pop("nll"), size(policy.language_model))


def _nll(reference: Policy, sequences: Sequences) -> Tensor:
    """-log p of each response token at temperature 1, packed (N,)."""
    logprobs: Tensor = reference(sequences, 1.0).logprobs
    return -logprobs


def _sums(forward: Callable[[Sequences], Tensor], sequences: Sequences) -> Tensor:
    """A number of each response token, summed over each response, (B,)."""
    return per_token(forward, sequences, TOKENS_AT_ONCE).double().sum(1)


def size(model: torch.nn.Module) -> dict[str, float]:
    """How many parameters a model has, and what they take in the memory, in MB (10^6 bytes)."""
    return {
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        "size_mb": computing.bytes_of(model.parameters()) / 1e6,
    }


def _check_room(policy: Policy, prompts: Prompts, new: int) -> None:
    """See that every prompt and its response fit into the model's context."""
    config = policy.language_model.config
    longest = max(map(len, prompts.token_ids))
    if not loading.fits(config, longest, new):
        raise DataError(
            f"a held-out prompt of {longest} tokens and evaluate.max_new_tokens {new} do not fit into the model's "
            f"context of {config.max_position_embeddings} tokens; lower evaluate.max_new_tokens, or set "
            "data.max_prompt_tokens"
        )


def given(context: Context, rows: HeldOut) -> Answers | None:
    """The first reference of each prompt as if a policy had written it; None where there is none at all."""
    if not any(rows.references):
        return None
    reading = tokenizer(context)
    texts = [known[0] if known else None for known in rows.references]
    lengths = [
        np.nan if text is None else len(reading(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts
    ]
    return Answers(texts, {"length_tokens": np.array(lengths, dtype=np.float64)})
