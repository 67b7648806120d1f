"""The file of ``accelerate config`` that ``resources.accelerate_config`` names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config.yaml12 import read_mapping
from rlhf.errors import ConfigError

if TYPE_CHECKING:
    from rlhf.config.resources import Resources

REPLICATED = ("MULTI_GPU", "MULTI_CPU", "NO")  # of accelerate's kinds: each process has the whole model


def check_file(resources: Resources) -> None:
    """See that the file of ``accelerate_config`` is there and describes what this project can run.

    Raises:
        ConfigError: it is missing, not YAML, for several machines, for sharded models, or for another number of
            processes.
    """
    if resources.accelerate_config is None:
        return
    path = Path(resources.accelerate_config)
    where = f"resources.accelerate_config: {path.resolve()}"
    try:
        content: dict[str, Any] = read_mapping(path.read_text(encoding="utf-8"), str(path))[0]
    except FileNotFoundError:
        raise ConfigError(f"{where}: there is no such file; `accelerate config --config_file FILE` makes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None
    kind = str(content.get("distributed_type", "NO")).upper()
    if kind not in REPLICATED:
        raise ConfigError(
            f"{where}: distributed_type is {kind}; this version trains with whole models in every process, so it must "
            f"be one of {', '.join(REPLICATED)}. To save memory: model.lora_rank, model.gradient_checkpointing"
        )
    if content.get("num_machines", 1) != 1:
        raise ConfigError(f"{where}: num_machines is {content['num_machines']}; all processes run on this machine: 1")
    if content.get("num_processes", resources.processes) != resources.processes:
        raise ConfigError(
            f"{where}: num_processes is {content['num_processes']}, but resources.processes is {resources.processes}; "
            "make them the same, or take the former out"
        )
