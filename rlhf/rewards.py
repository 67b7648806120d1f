"""Rewards: Python functions, a trained reward model, or a weighted sum of several.

A reward function takes the texts of a batch and gives one number a row::

    def brevity(prompts, responses, **columns) -> list[float]:
        return [-len(response.split()) for response in responses]

``columns`` are the other columns of the prompt files, as lists; a function that names just some of them gets just
these. Responses have no special tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import ConfigError, RewardError
from rlhf.scoring import score_token_ids, usable_length

RewardFunction = Callable[..., Sequence[float]]


class Scorer(Protocol):
    """One number for each response of a batch."""

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float]:
        """Score a batch; all sequences have one entry a row."""


# ----------------------------------------------------------------------------------------------------- Python functions
def load_function(name: str) -> RewardFunction:
    """Import ``module:function`` or ``path/file.py:function``; a relative path starts at the working directory.

    Raises:
        ConfigError: the name has another form, or there is no such module, file or function, or its import fails.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ConfigError(f"{name!r} does not name a function; write `module:function` or `path/file.py:function`")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # a user's module may raise anything on import
        raise ConfigError(
            f"{name!r}: {place} cannot be imported: {type(error).__name__}: {error}. "
            "A module must be on the Python path; a file is named by its path, ending in .py"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = ", ".join(sorted(key for key, value in vars(module).items() if inspect.isfunction(value)))
        raise ConfigError(f"{name!r}: {place} has no function {attribute!r}; it has {found or 'none'}")
    return function  # type: ignore[no-any-return]


def _load_file(path: Path) -> ModuleType:
    path = path.expanduser().absolute()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call_reward(
    function: RewardFunction,
    name: str,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    """Call a reward function and see that it gave one finite number a row.

    Raises:
        RewardError: it raised, or gave something else. The message names the function and the first bad row.
    """
    columns = _accepted(function, columns)
    try:
        result = function(list(prompts), list(responses), **columns)
    except Exception as error:
        row = _first_failing(function, prompts, responses, columns)
        where = "the batch" if row is None else _describe(row, prompts, responses)
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error}; on {where}") from error
    try:
        values = list(result)
    except TypeError as error:
        raise RewardError(
            f"reward {name!r} returned {type(result).__name__}; it must return a list of {len(responses)} numbers"
        ) from error
    if len(values) != len(responses):
        raise RewardError(f"reward {name!r} returned {len(values)} numbers for {len(responses)} responses")
    return [_number(value, name, row, prompts, responses) for row, value in enumerate(values)]


def _accepted(function: RewardFunction, columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The columns that a function takes: all, if it has ``**columns``."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in callables have no signature
        return {}
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    positional = list(parameters)[:2]
    return {
        key: list(values)
        for key, values in columns.items()
        if (takes_all or key in parameters) and key not in positional
    }


def _first_failing(
    function: RewardFunction, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, list[Any]]
) -> int | None:
    """The first row that a function fails on when it gets this row only."""
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            function([prompt], [response], **{key: [values[row]] for key, values in columns.items()})
        except Exception:
            return row
    return None


def _number(value: Any, name: str, row: int, prompts: Sequence[str], responses: Sequence[str]) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        where = _describe(row, prompts, responses)
        raise RewardError(f"reward {name!r} returned {value!r}, which is not a number, for {where}") from error
    if not math.isfinite(number):
        raise RewardError(f"reward {name!r} returned {number}, for {_describe(row, prompts, responses)}")
    return number


def _describe(row: int, prompts: Sequence[str], responses: Sequence[str]) -> str:
    return f"row {row}: prompt {prompts[row][-60:]!r}, response {responses[row][:60]!r}"


@dataclass(frozen=True)
class FunctionScorer:
    """A reward function with the name that its errors carry."""

    function: RewardFunction
    name: str

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float]:
        return call_reward(self.function, self.name, prompts, responses, columns)


# --------------------------------------------------------------------------------------------------------- reward model
@dataclass(frozen=True)
class RewardModel:
    """A trained classifier with one output as a scorer, with its own tokenizer.

    It scores the text prompt + response + its end-of-sequence token, tokenized as in its training, and reads the
    last real token (a length says which, so that padding may be end-of-sequence too). The score is
    (logit - score_mean) / score_std with the numbers of the model's configuration, 0 and 1 where there are none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens_at_once: int = 16384  # of a forward pass, padding included

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float]:
        """Scores of the responses; ``columns`` are not used.

        Raises:
            RewardError: a text is longer than the model's context.
        """
        rows = self._token_ids(prompts, responses)
        scores = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        while order:
            size = max(1, self.tokens_at_once // len(rows[order[0]]))
            batch, order = order[:size], order[size:]
            for row, score in zip(batch, self._scores([rows[row] for row in batch]).tolist(), strict=True):
                scores[row] = score
        return scores

    def _token_ids(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        ids, limit = score_token_ids(self.tokenizer, texts), usable_length(self.model)
        for row, tokens in enumerate(ids):
            if limit is not None and len(tokens) > limit:
                raise RewardError(
                    f"the reward model reads at most {limit} tokens, but prompt and response have {len(tokens)} in "
                    f"{_describe(row, prompts, responses)}; lower ppo.max_new_tokens or data.max_prompt_tokens"
                )
        return ids

    @torch.no_grad()
    def _scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Normalised scores (B,) of rows of token ids."""
        device = self.model.device
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), int(self.tokenizer.pad_token_id or 0))
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        logits = self._logits(ids.to(device), mask.to(device), lengths.to(device))
        config = self.model.config
        return (logits.float() - getattr(config, "score_mean", 0.0)) / getattr(config, "score_std", 1.0)

    def _logits(self, ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        head = getattr(self.model, "score", None)
        if not isinstance(head, nn.Linear):  # an encoder: it knows itself what it reads
            pooled: Tensor = self.model(input_ids=ids, attention_mask=mask).logits[:, 0]
            return pooled
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
        with torch.autocast(last.device.type, enabled=False):  # a score in bf16 has three digits
            scores: Tensor = head(last.float())
        return scores[:, 0]


# --------------------------------------------------------------------------------------------------------- weighted sum
@dataclass(frozen=True)
class Rewards:
    """A weighted sum of scorers. ``parts`` maps the short name of each, as in its metric, to weight and scorer."""

    parts: Mapping[str, tuple[float, Scorer]]

    @classmethod
    def of(cls, *functions: RewardFunction) -> Rewards:
        """The plain sum of reward functions, each called by its own name."""
        return cls({f.__name__: (1.0, FunctionScorer(f, f.__name__)) for f in functions})

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum (B,), and each component (B,) before its weight."""
        components = {
            name: torch.tensor(scorer(prompts, responses, columns), dtype=torch.float32)
            for name, (_, scorer) in self.parts.items()
        }
        scores = torch.zeros(len(responses))
        for name, (weight, _) in self.parts.items():
            scores += weight * components[name]
        return scores, components


def make_rewards(weights: Mapping[str, float], reward_model: RewardModel | None) -> Rewards:
    """The weighted sum that a configuration names: ``model`` is ``reward_model``, anything else a function.

    A component is called by the function's name alone, or by all of it where two functions have the same name.

    Raises:
        ConfigError: a function cannot be loaded, or ``model`` is named and there is no reward model.
    """
    short = [name.rpartition(":")[2] for name in weights]
    parts: dict[str, tuple[float, Scorer]] = {}
    for name, weight in weights.items():
        label = name.rpartition(":")[2]
        if short.count(label) > 1 and name != "model":
            label = name.replace(":", ".").replace("/", ".").lstrip(".")
        if name != "model":
            parts[label] = (weight, FunctionScorer(load_function(name), name))
        elif reward_model is None:
            raise ConfigError("ppo.rewards names `model`, but there is no reward model; turn the reward stage on")
        else:
            parts[label] = (weight, reward_model)
    return Rewards(parts)
