"""How torch computes here: seeds, threads, device, precision; and what models take."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch
from transformers import set_seed
from transformers.utils import logging as hf_logging

from rlhf.errors import ConfigError
from rlhf.models import allocator

if TYPE_CHECKING:
    from rlhf.config.resources import Resources


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (every device)."""
    set_seed(seed)


def set_up_cpu(resources: Resources) -> None:
    """Keep freed memory, and set torch's number of CPU threads; 0 leaves it: all cores, or OMP_NUM_THREADS.

    What is there at the first call, above all the libraries, is no longer looked through for garbage.
    """
    _pass_over_libraries()
    allocator.keep_freed_memory()
    if resources.threads:
        torch.set_num_threads(resources.threads)


@cache
def _pass_over_libraries() -> None:
    """Once in a process. Each training begins with a collection, which took 0.5 s for objects that never go."""
    gc.collect()
    gc.freeze()


def device_of(resources: Resources) -> torch.device:
    """The device to compute on.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    if resources.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "resources.device is `cuda`, but torch sees no CUDA device: install a CUDA build of torch, or set "
            "resources.device to `auto` or `cpu`"
        )
    wants_cuda = resources.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if wants_cuda else "cpu")


def mixed_precision(resources: Resources) -> Literal["no", "bf16", "fp16"]:
    """The type under autocast, as accelerate calls it; with ``auto``, bf16 where there is CUDA and none elsewhere.

    Raises:
        ConfigError: fp16 is asked for and there is no CUDA device.
    """
    device = device_of(resources)
    match resources.precision:
        case "fp32":
            return "no"
        case "bf16":
            return "bf16"
        case "fp16":
            if device.type != "cuda":
                raise ConfigError(
                    "resources.precision is `fp16`, which needs a CUDA device; set it to `bf16`, `fp32` or `auto`"
                )
            return "fp16"
        case "auto":
            return "bf16" if device.type == "cuda" else "no"


def autocast(resources: Resources) -> torch.autocast:
    """A context of forward passes in the precision that the configuration asks for."""
    found = mixed_precision(resources)
    dtype = torch.float16 if found == "fp16" else torch.bfloat16
    return torch.autocast(device_of(resources).type, dtype, enabled=found != "no")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers, which draws one for every model that is saved.

    And without its warning at a resume that weights are missing from the checkpoint: those are the ones tied to
    others, which are never saved twice. A file that is really missing is seen before (``checkpoints.latest``).
    """
    bars, trainer_log = hf_logging.is_progress_bar_enabled(), logging.getLogger("transformers.trainer")
    hf_logging.disable_progress_bar()
    trainer_log.addFilter(_no_tied_weights)
    try:
        yield
    finally:
        trainer_log.removeFilter(_no_tied_weights)
        if bars:
            hf_logging.enable_progress_bar()


def _no_tied_weights(record: logging.LogRecord) -> bool:
    return "missing keys in the checkpoint" not in record.getMessage()


def trainable_parameters(model: torch.nn.Module) -> int:
    """How many numbers the optimizer changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """What tensors take, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
