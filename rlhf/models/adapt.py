"""What adapts a loaded model to its training: LoRA adapters, dropout off, one kernel for GELU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers.activations import NewGELUActivation

from rlhf.models.loading import head_parts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, rank: int, alpha: float) -> PeftModel:
    """Wrap a model with LoRA adapters on all linear layers but the head. The base weights are frozen.

    Adapters are float32, whatever the type of the weights under them.

    The new adapter changes nothing yet: its second factor is 0. A classifier's head stays trainable. Its scale is
    alpha / rank. Hu et al. 2021; adapters on every layer as in Dettmers et al. 2023.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    if model.get_output_embeddings() is not None:
        task, heads = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM", None
    else:
        heads = list(head_parts(model)) or None
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
    """The plain model, in float32, with the adapters added into its weights. ``model`` is used up by this.

    Half-precision weights become float32 first: most of what an adapter adds is too small for their digits.
    """
    merged: PreTrainedModel = model.float().merge_and_unload()
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
