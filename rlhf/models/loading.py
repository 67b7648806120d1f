"""Models and tokenizers: loaded and saved.

A model's name is a local directory or a hub id. Weights are float32 unless a ``dtype`` says otherwise, which is for
frozen ones: an optimizer's small steps would be rounded away. A score head is float32 always. Files are safetensors,
and code that comes with a hub model runs only where the configuration says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from rlhf.errors import DataError, ModelError
from rlhf.store import hub

if TYPE_CHECKING:
    from rlhf.models.dtypes import Dtype

T = TypeVar("T")


# ----------------------------------------------------------------------------------------------------------- tokenizers
def load_tokenizer(
    path: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with an end-of-sequence token and a padding token.

    Without a padding token, end-of-sequence is used for it: masks come from lengths, never from ``!= pad``, so
    that this changes nothing, and no row is added to the embeddings. An encoder's ``[SEP]`` stands in for a
    missing end-of-sequence token. The padding side is left as it is.

    Raises:
        ModelError: it cannot be loaded, or it has no token that could end a sequence.
    """
    tokenizer: PreTrainedTokenizerBase = _load(
        AutoTokenizer.from_pretrained, "tokenizer", path, revision, trust_remote_code=trust_remote_code
    )
    if tokenizer.eos_token is None:
        if tokenizer.sep_token is None:
            raise ModelError(
                f"tokenizer {str(path)!r} has no end-of-sequence token, so no response could ever end; "
                "set eos_token in its tokenizer_config.json"
            )
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], encoder: bool = False
) -> list[list[int]]:
    """Token ids of prompts: no special tokens but a beginning-of-sequence where the tokenizer adds it by itself.

    With ``encoder``, all special tokens that the tokenizer adds: an encoder reads a whole text, not the first part of
    one.
    """
    if not prompts:
        return []
    whole: list[list[int]] = tokenizer(list(prompts), add_special_tokens=encoder)["input_ids"]
    first: list[int] = tokenizer(prompts[0])["input_ids"][:1]
    adds_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] != whole[0][:1]
    return [first + ids for ids in whole] if adds_bos else whole


# -------------------------------------------------------------------------------------------------------------- loading
def load_config(path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of a model.

    Raises:
        ModelError: it cannot be loaded.
    """
    return _load(AutoConfig.from_pretrained, "model", path, revision, trust_remote_code=trust_remote_code)


def is_encoder_decoder(path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> bool:
    """Whether a model has an encoder for its prompts.

    Raises:
        ModelError: its configuration cannot be loaded.
    """
    return bool(load_config(path, revision, trust_remote_code).is_encoder_decoder)


def load_policy(
    path: str | Path, revision: str | None = None, trust_remote_code: bool = False, dtype: Dtype = "float32"
) -> PreTrainedModel:
    """A language model, causal or encoder-decoder.

    Raises:
        ModelError: it cannot be loaded, lacks weights, or has a decoder that does not know how to start.
    """
    encoder = is_encoder_decoder(path, revision, trust_remote_code)
    kind = AutoModelForSeq2SeqLM if encoder else AutoModelForCausalLM
    model = _load_weights(kind, "model", path, revision, dtype, trust_remote_code=trust_remote_code)
    if encoder and getattr(model.config, "decoder_start_token_id", None) is None:
        raise ModelError(
            f"model {str(path)!r} is an encoder-decoder with no decoder_start_token_id in its config.json; set it to "
            "the token that its decoder was trained to start with (of T5: the padding token)"
        )
    return model


def load_reward_model(
    path: str | Path, revision: str | None = None, trust_remote_code: bool = False, dtype: Dtype = "float32"
) -> PreTrainedModel:
    """A classifier with one output, the score. ``config.score_mean`` and ``score_std`` are there once it is trained.

    Raises:
        ModelError: it cannot be loaded, lacks weights (a language model has no trained score head), or has more
            than one output.
    """
    config = load_config(path, revision, trust_remote_code)
    if config.num_labels != 1:
        raise ModelError(
            f"reward model {str(path)!r} has {config.num_labels} outputs; a reward model has one, the score"
        )
    kind = AutoModelForSequenceClassification
    model = _load_weights(kind, "reward model", path, revision, dtype, trust_remote_code=trust_remote_code)
    _keep_score_in_float32(model)
    return model


def reward_from_policy(
    path: str | Path, revision: str | None = None, trust_remote_code: bool = False, dtype: Dtype = "float32"
) -> PreTrainedModel:
    """The classifier of a policy's or an encoder's architecture: its trunk and a new head with one output.

    The head's last layer is drawn by torch's global generator from a normal distribution with mean 0 and standard
    deviation 1 / sqrt(d + 1), d the hidden size (Stiennon et al. 2020).

    Raises:
        ModelError: it cannot be loaded.
    """
    with _quiet():  # transformers warns that the head is new; that is the point
        model: PreTrainedModel = _load(
            AutoModelForSequenceClassification.from_pretrained,
            "model",
            path,
            revision,
            num_labels=1,
            ignore_mismatched_sizes=True,  # a classifier with other labels lends its trunk
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
        )
    _keep_score_in_float32(model)
    head = _last_layer(model)
    nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return model


def value_model_from(
    policy_path: str | Path,
    reward_path: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: Dtype = "float32",
) -> PreTrainedModel:
    """The initial value model: the reward model where it can read the policy's tokens, else the policy.

    The reward model serves where its architecture and its vocabulary are the policy's (Stiennon et al. 2020,
    G.1). One that starts from the policy has a zero head: it predicts 0 everywhere. ``revision`` is that of
    ``policy_path``.

    Raises:
        ModelError: one of them cannot be loaded.
    """
    if reward_path is not None and _same_family(policy_path, reward_path, revision, trust_remote_code):
        return load_reward_model(reward_path, trust_remote_code=trust_remote_code, dtype=dtype)
    model = reward_from_policy(policy_path, revision, trust_remote_code, dtype)
    nn.init.zeros_(score_head(model).weight)
    return model


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The layer of a causal classifier that turns a hidden state into a score.

    Raises:
        ModelError: the model keeps its head elsewhere, as encoders do.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"a {model.config.model_type} classifier has no `score` layer over single tokens; "
            "take a causal architecture here, e.g. the policy's"
        )
    return head


def head_parts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The parts with weights of a classifier that are not its trunk, in their order; the last one gives the score."""
    trunk = model.base_model_prefix
    parts = model.named_children() if hasattr(model, trunk) else ()
    return {name: part for name, part in parts if name != trunk and next(part.parameters(), None) is not None}


def _last_layer(model: PreTrainedModel) -> nn.Linear:
    """The layer that gives the score: ``score``, ``classifier``, or the ``out_proj`` of a head with several layers.

    Raises:
        ModelError: there is none.
    """
    layers = [part for head in head_parts(model).values() for part in head.modules() if isinstance(part, nn.Linear)]
    if not layers or layers[-1].out_features != 1:
        raise ModelError(f"a {model.config.model_type} classifier has no linear layer with one output at its end")
    return layers[-1]


def _keep_score_in_float32(model: PreTrainedModel) -> None:
    """A score in bf16 has three digits. The head has none of autocast, and casts what the layers before it give."""
    for head in head_parts(model).values():
        head.float().register_forward_pre_hook(_enter_float32)
        head.register_forward_hook(_leave_float32, always_call=True)


def _enter_float32(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    off: Any = torch.autocast(inputs[0].device.type, enabled=False)
    off.__enter__()
    module.__dict__["autocast_off"] = off
    return tuple(tensor.float() for tensor in inputs)


def _leave_float32(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor | None) -> None:
    module.__dict__.pop("autocast_off").__exit__(None, None, None)


def _same_family(policy: str | Path, reward: str | Path, revision: str | None, trust_remote_code: bool) -> bool:
    """Whether a reward model has the policy's architecture and vocabulary, and reads as long a text."""

    def parts(path: str | Path, revision: str | None) -> tuple[str, int, dict[str, int]]:
        config = load_config(path, revision, trust_remote_code)
        length = getattr(config, "max_position_embeddings", None) or 0
        return config.model_type, length, load_tokenizer(path, revision, trust_remote_code).get_vocab()

    (kind, length, vocabulary), (reward_kind, reward_length, reward_vocabulary) = (
        parts(policy, revision),
        parts(reward, None),
    )
    return kind == reward_kind and vocabulary == reward_vocabulary and reward_length >= length


def _load_weights(
    kind: Any, what: str, path: str | Path, revision: str | None, dtype: Dtype, **options: Any
) -> PreTrainedModel:
    """A model all of whose weights are in its files: transformers fills in random ones with just a warning."""
    with _quiet():
        options |= {"dtype": getattr(torch, dtype), "output_loading_info": True}
        model, info = _load(kind.from_pretrained, what, path, revision, **options)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:5])
        raise ModelError(
            f"{what} {str(path)!r} has no weights for {missing}: it was saved as another kind of model. "
            "Name a directory that was saved as this kind"
        )
    loaded: PreTrainedModel = model
    return loaded


def _load(loader: Callable[..., T], what: str, path: str | Path, revision: str | None, **options: Any) -> T:
    """Call a ``from_pretrained`` and turn what it raises into a message that says where it looked.

    A hub model is loaded by its commit, and from the cache alone where the hub does not answer.
    """
    name, where, place = str(path), f"looked in the local directory {Path(path).absolute()}", str(path)
    if not Path(path).is_dir():
        found = hub.find(name, revision)
        options["revision"] = found.commit
        if found.online:
            where = f"looked on the hub and in its cache folder {hub.cache_folder(name)}"
        else:
            place = str(hub.snapshot(name, found.commit))
            where = f"the hub did not answer; looked in its cache folder {place}"
    try:
        return loader(place, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{what} {name!r} cannot be loaded; {where}: {type(error).__name__}: {reason} "
            "Set model.path (reward.path for a reward model) to a local directory with config.json, "
            "model.safetensors and a tokenizer"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def fits(config: Any, prompt_tokens: int, new_tokens: int) -> bool:
    """Whether a prompt and a response fit into the context of a model with this configuration.

    The halves of an encoder-decoder have the limit each. Without a limit, as in T5, everything fits.
    """
    limit = getattr(config, "max_position_embeddings", None)
    needed = max(prompt_tokens, new_tokens) if config.is_encoder_decoder else prompt_tokens + new_tokens
    return limit is None or needed <= limit


# --------------------------------------------------------------------------------------------------------------- saving
def check_room(
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    model: PreTrainedModel,
    where: str,
    setting: str = "ppo.max_new_tokens",
) -> None:
    """See that each prompt (token ids) with a response of the longest kind fits into the model's context.

    Raises:
        DataError: one does not.
    """
    longest = max(range(len(prompts)), key=lambda row: len(prompts[row]))
    tokens = len(prompts[longest])
    if not fits(model.config, tokens, new_tokens):
        limit = model.config.max_position_embeddings
        most = limit if model.config.is_encoder_decoder else limit - new_tokens
        raise DataError(
            f"{where}, row {longest}: {tokens} prompt tokens and {setting} {new_tokens} are more than "
            f"the model's context of {limit}; lower {setting}, or set data.max_prompt_tokens to at most "
            f"{most} with data.too_long: drop"
        )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Write an ordinary Hugging Face directory: configuration, safetensors weights, tokenizer; nothing pickled."""
    with _quiet():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
