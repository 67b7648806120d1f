"""Models and tokenizers: made from random weights, loaded, adapted with LoRA, saved.

A model's name is a local directory or a hub id. Weights are float32 (lower precision is for autocast, not for
storage), files are safetensors, and code that comes with a hub model runs only where the configuration says so.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.utils import logging as hf_logging

from rlhf.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel

    from rlhf.config import Model

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------- random weights
def random_model(model: Model, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A causal model with random weights of the size in ``model``, for the vocabulary of ``tokenizer``.

    The weights come from torch's global generator: seed it first. Dropout is 0, and the output embeddings are
    the input embeddings.
    """
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    config = _ARCHITECTURES[model.architecture](model, shared)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return made


def _gpt2(model: Model, shared: Mapping[str, Any]) -> PreTrainedConfig:
    return GPT2Config(
        n_layer=model.layers,
        n_embd=model.width,
        n_head=model.heads,
        n_positions=model.context,
        activation_function="gelu_pytorch_tanh",  # `gelu_new` in one kernel instead of eight
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
        **shared,
    )


def _llama(model: Model, shared: Mapping[str, Any]) -> PreTrainedConfig:
    return LlamaConfig(
        num_hidden_layers=model.layers,
        hidden_size=model.width,
        intermediate_size=4 * model.width,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        max_position_embeddings=model.context,
        **shared,
    )


_ARCHITECTURES: dict[str, Callable[[Model, Mapping[str, Any]], PreTrainedConfig]] = {
    "gpt2": _gpt2,
    "llama": _llama,
}


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
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer.from_pretrained, "tokenizer", path, **where)
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
def is_encoder_decoder(path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> bool:
    """Whether a model has an encoder for its prompts.

    Raises:
        ModelError: its configuration cannot be loaded.
    """
    config = _load(AutoConfig.from_pretrained, "model", path, revision=revision, trust_remote_code=trust_remote_code)
    return bool(config.is_encoder_decoder)


def load_policy(path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """A language model, causal or encoder-decoder.

    Raises:
        ModelError: it cannot be loaded, or lacks weights.
    """
    kind = AutoModelForSeq2SeqLM if is_encoder_decoder(path, revision, trust_remote_code) else AutoModelForCausalLM
    return _load_weights(kind, "model", path, revision=revision, trust_remote_code=trust_remote_code)


def load_reward_model(
    path: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A classifier with one output, the score. ``config.score_mean`` and ``score_std`` are there once it is trained.

    Raises:
        ModelError: it cannot be loaded, lacks weights (a language model has no trained score head), or has more
            than one output.
    """
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = _load(AutoConfig.from_pretrained, "reward model", path, **where)
    if config.num_labels != 1:
        raise ModelError(
            f"reward model {str(path)!r} has {config.num_labels} outputs; a reward model has one, the score"
        )
    return _load_weights(AutoModelForSequenceClassification, "reward model", path, **where)


def reward_from_policy(
    path: str | Path, revision: str | None = None, trust_remote_code: bool = False
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
            num_labels=1,
            ignore_mismatched_sizes=True,  # a classifier with other labels lends its trunk
            dtype=torch.float32,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
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
) -> PreTrainedModel:
    """The initial value model: the reward model where it can read the policy's tokens, else the policy.

    The reward model serves where its architecture and its vocabulary are the policy's (Stiennon et al. 2020,
    G.1). One that starts from the policy has a zero head: it predicts 0 everywhere. ``revision`` is that of
    ``policy_path``.

    Raises:
        ModelError: one of them cannot be loaded.
    """
    if reward_path is not None and _same_family(policy_path, reward_path, revision, trust_remote_code):
        return load_reward_model(reward_path, trust_remote_code=trust_remote_code)
    model = reward_from_policy(policy_path, revision, trust_remote_code)
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


def _heads(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The parts with weights of a classifier that are not its trunk, in their order; the last one gives the score."""
    trunk = model.base_model_prefix
    parts = model.named_children() if hasattr(model, trunk) else ()
    return {name: part for name, part in parts if name != trunk and next(part.parameters(), None) is not None}


def _last_layer(model: PreTrainedModel) -> nn.Linear:
    """The layer that gives the score: ``score``, ``classifier``, or the ``out_proj`` of a head with several layers.

    Raises:
        ModelError: there is none.
    """
    layers = [part for head in _heads(model).values() for part in head.modules() if isinstance(part, nn.Linear)]
    if not layers or layers[-1].out_features != 1:
        raise ModelError(f"a {model.config.model_type} classifier has no linear layer with one output at its end")
    return layers[-1]


def _same_family(policy: str | Path, reward: str | Path, revision: str | None, trust_remote_code: bool) -> bool:
    """Whether a reward model has the policy's architecture and vocabulary, and reads as long a text."""

    def parts(path: str | Path, revision: str | None) -> tuple[str, int, dict[str, int]]:
        where = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = _load(AutoConfig.from_pretrained, "model", path, **where)
        length = getattr(config, "max_position_embeddings", None) or 0
        return config.model_type, length, load_tokenizer(path, revision, trust_remote_code).get_vocab()

    (kind, length, vocabulary), (reward_kind, reward_length, reward_vocabulary) = (
        parts(policy, revision),
        parts(reward, None),
    )
    return kind == reward_kind and vocabulary == reward_vocabulary and reward_length >= length


def _load_weights(kind: Any, what: str, path: str | Path, **options: Any) -> PreTrainedModel:
    """A model all of whose weights are in its files: transformers fills in random ones with just a warning."""
    with _quiet():
        model, info = _load(kind.from_pretrained, what, path, dtype=torch.float32, output_loading_info=True, **options)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:5])
        raise ModelError(
            f"{what} {str(path)!r} has no weights for {missing}: it was saved as another kind of model. "
            "Name a directory that was saved as this kind"
        )
    loaded: PreTrainedModel = model
    return loaded


def _load(loader: Callable[..., T], what: str, path: str | Path, **options: Any) -> T:
    """Call a ``from_pretrained`` and turn what it raises into a message that says where it looked."""
    name = str(path)
    try:
        return loader(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{what} {name!r} cannot be loaded; {_searched(name)}: {type(error).__name__}: {reason} "
            "Set model.path (reward.path for a reward model) to a local directory with config.json, "
            "model.safetensors and a tokenizer"
        ) from error


def _searched(name: str) -> str:
    """Where a model of this name was looked for."""
    directory = Path(name).expanduser().absolute()
    if directory.is_dir():
        return f"looked in the local directory {directory}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "ON", "YES"}:
        return f"there is no directory {directory}, and the hub was not asked because HF_HUB_OFFLINE is set"
    return f"there is no directory {directory}, and the hub has no such model or is not reachable"


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


# ----------------------------------------------------------------------------------------------------- LoRA and dropout
def add_lora(model: PreTrainedModel, rank: int, alpha: float) -> PeftModel:
    """Wrap a model with LoRA adapters on all linear layers but the head. The base weights are frozen.

    The new adapter changes nothing yet: its second factor is 0. A classifier's head stays trainable. Its scale is
    alpha / rank. Hu et al. 2021; adapters on every layer as in Dettmers et al. 2023.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    if model.get_output_embeddings() is not None:
        task, heads = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM", None
    else:
        heads = list(_heads(model)) or None
        task = "SEQ_CLS" if heads else "FEATURE_EXTRACTION"
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        exclude_modules=heads,
        modules_to_save=heads,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=task,
    )
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a property under its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """The plain model with the adapters added into its weights. ``model`` is used up by this."""
    merged: PreTrainedModel = model.merge_and_unload()
    return merged


def save_adapter(model: PeftModel, directory: str | Path) -> None:
    """Write the adapters by themselves, for ``PeftModel.from_pretrained`` over the model that they started from.

    The place of that model on this machine is left out: it would mean nothing on another one.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = ""
    model.save_pretrained(str(directory))
    (Path(directory) / "README.md").unlink(missing_ok=True)  # a form for the hub, with nothing filled in


def set_dropout_zero(model: nn.Module) -> None:
    """Turn off every dropout of a model, in training mode too. ``config``, which is saved with it, stays.

    With dropout, the log-probabilities of an update would differ from its rollout's at the same weights.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
                setattr(module, name, 0.0)


@contextmanager
def configured_dropout_off(model: nn.Module) -> Iterator[None]:
    """Within it, the dropouts that a model's configuration names are 0: Falcon reads its own there, at every step."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    were = [(c, {k: v for k, v in vars(c).items() if isinstance(v, float) and "drop" in k}) for c in configs.values()]
    for config, names in were:
        vars(config).update(dict.fromkeys(names, 0.0))
    try:
        yield
    finally:
        for config, names in were:
            vars(config).update(names)


def fuse_gelu(model: nn.Module) -> None:
    """Compute the tanh form of GELU, where a model has it in eight small steps (GPT-2's ``gelu_new``), in one kernel.

    The function is the same; its last bits are not.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


# --------------------------------------------------------------------------------------------------------------- saving
def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Write an ordinary Hugging Face directory: configuration, safetensors weights, tokenizer; nothing pickled."""
    with _quiet():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
