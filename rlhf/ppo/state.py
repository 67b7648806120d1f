"""The state of a training on disk: weights, optimizer, KL coefficient, history. Nothing in it runs code on loading.

Learning rates, the order of the prompts and all random numbers are functions of the seed and the update's number
(``batching``), so that the number is all the state they have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf import checkpoints
from rlhf.errors import ArtifactError
from rlhf.ppo.batching import Prompts

REMEMBERED = ("reward_mean", "score_mean", "kl", "response_length_mean", "eos_rate")


class Sample(NamedTuple):
    """One row of the table of samples."""

    update: int
    prompt: str
    response: str
    score: float


@dataclass
class Progress:
    """What an update leaves behind besides weights. ``saved`` is the update of the last checkpoint, 0 for none."""

    kl_coef: float
    update: int = 0
    saved: int = 0
    history: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in REMEMBERED})
    samples: list[Sample] = field(default_factory=list)

    def remember(self, metrics: Mapping[str, float]) -> None:
        """Keep what the final metrics are made of."""
        for name, values in self.history.items():
            values.append(metrics[f"ppo/{name}"])


def save(
    directory: Path, policy: nn.Module, value_model: nn.Module, optimizer: Any, progress: Progress, mark: int
) -> None:
    """Write the checkpoint of ``progress.update``; ``mark`` is the tracker's position."""
    progress.saved = progress.update

    def write(path: Path) -> None:
        save_file(_trainable(policy), path / "policy.safetensors")
        save_file(_trainable(value_model), path / "value_model.safetensors")
        torch.save(optimizer.state_dict(), path / "optimizer.pt")
        record = {"mark": mark, "progress": asdict(progress)}
        (path / "progress.json").write_text(json.dumps(record), encoding="utf-8")

    checkpoints.save(directory, progress.update, write)


def restore(directory: Path, policy: nn.Module, value_model: nn.Module, optimizer: Any) -> tuple[Progress, int] | None:
    """Load the newest checkpoint that verifies into models and optimizer; its progress and the tracker's mark.

    Raises:
        ArtifactError: the checkpoint is of other models.
    """
    path = checkpoints.latest(directory)
    if path is None:
        return None
    _load_into(policy, path / "policy.safetensors")
    _load_into(value_model, path / "value_model.safetensors")
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
    record = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    progress = Progress(**record["progress"])
    progress.samples = [Sample(*row) for row in progress.samples]
    return progress, int(record["mark"])


def drop_damaged(directory: Path) -> None:
    """Delete what is newer than the last good checkpoint, lest it be counted among the ones that are kept."""
    checkpoints.drop_after(directory, checkpoints.latest(directory))


def save_batch(path: Path, batch: Any) -> None:
    """Write tensors and texts in nested dicts so that ``torch.load`` reads them without running code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(_plain(batch), path)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    """The weights that learn, each once however many layers share it: all of them, or the adapters."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _load_into(model: nn.Module, path: Path) -> None:
    saved = load_file(path)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())[:3]
        raise ArtifactError(f"checkpoint {path} is of another model: {', '.join(odd)} differ; delete its folder")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


def _plain(value: Any) -> Any:
    if isinstance(value, Prompts):
        return {"texts": list(value.texts), "token_ids": [list(ids) for ids in value.token_ids]}
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if hasattr(value, "_asdict"):
        value = value._asdict()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
