"""The state of a training on disk: weights, optimizer, KL coefficient, history. Nothing in it runs code on loading.

Learning rates, the order of the prompts and all random numbers are functions of the seed and the update's number
(``batching``), so that the number is all the state they have.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.errors import ArtifactError
from rlhf.ppo import overoptimisation, validation
from rlhf.ppo.batching import Prompts
from rlhf.ppo.core import Running
from rlhf.ppo.learner import Learner
from rlhf.ppo.overoptimisation import Peak
from rlhf.ppo.policy import Policy
from rlhf.ppo.validation import Best
from rlhf.store import checkpoints

BEST = "best"  # folder of the best evaluated policy, among the checkpoints
CONTROLLERS, OPTIMIZER = "controllers.json", "optimizer.safetensors"
REMEMBERED = ("reward_mean", "score_mean", "kl", "response_length_mean", "eos_rate")


class Sample(NamedTuple):
    """One row of the table of samples."""

    update: int
    prompt: str
    response: str
    score: float


@dataclass
class Progress:
    """What an update leaves behind besides weights. ``saved`` is the update of the last checkpoint, 0 for none.

    ``lr_scale`` is what ``lr_target_kl`` has made of the policy's learning rate, ``scores`` what ``scale_scores``
    knows. ``evaluations`` has one row for each, the one before the first update included: ``update`` and its metrics;
    ``peaks`` where each judge's scores were highest.
    """

    kl_coef: float
    lr_scale: float = 1.0
    scores: Running = field(default_factory=Running)
    best: Best | None = None
    update: int = 0
    saved: int = 0
    history: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in REMEMBERED})
    samples: list[Sample] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    peaks: dict[str, Peak] = field(default_factory=dict)

    def remember(self, metrics: Mapping[str, float]) -> None:
        """Keep what the final metrics are made of."""
        for name, values in self.history.items():
            values.append(metrics[f"ppo/{name}"])

    def evaluated(self, update: int, columns: Mapping[str, Tensor], planned: int) -> dict[str, float]:
        """Keep an evaluation, of which ``validation.measure`` gave the columns, and return its metrics.

        Those of ``validation.summary``, and ``overoptimised/<name>`` of each judge. ``planned`` is the number of
        evaluations of the whole training.
        """
        proxy, judges = columns["score"], validation.judged(columns)
        metrics = validation.summary(columns) | overoptimisation.alarms(proxy, judges, self.peaks, planned)
        overoptimisation.warn_if_new(metrics, self.evaluations, self.peaks)
        self.peaks = overoptimisation.followed(self.peaks, update, proxy, judges)
        self.evaluations.append({"update": update, **metrics})
        return metrics


def save(directory: Path, learner: Learner, progress: Progress, mark: int) -> None:
    """Write the checkpoint of ``progress.update``; ``mark`` is the tracker's position."""

    def write(path: Path) -> None:
        for name, model in _models(learner).items():
            save_file(_trainable(model), path / f"{name}.safetensors")
        save_file(_moments(learner.optimizer), path / OPTIMIZER)
        _write_json(path / "progress.json", {"mark": mark, "progress": asdict(progress)})
        scaler = learner.accelerator.scaler
        controllers = {"kl_coef": progress.kl_coef, "lr_scale": progress.lr_scale, "scores": progress.scores}
        _write_json(path / CONTROLLERS, controllers | {"loss_scaler": None if scaler is None else scaler.state_dict()})

    checkpoints.save(directory, progress.update, write)
    if progress.best is not None:  # this checkpoint knows it, so that no earlier one will be asked for
        checkpoints.prune(directory / BEST, keep=1)


def restore(directory: Path, learner: Learner) -> tuple[Progress, int] | None:
    """Load the newest checkpoint that verifies into models and optimizer; its progress and the tracker's mark.

    Raises:
        ArtifactError: the checkpoint is of other models.
    """
    path = checkpoints.latest(directory)
    if path is None:
        return None
    load(path, learner)
    record = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    progress = Progress(**record["progress"])
    progress.scores = Running(*progress.scores)
    progress.best = None if progress.best is None else Best(*progress.best)
    progress.samples = [Sample(*row) for row in progress.samples]
    progress.peaks = {name: Peak(*row) for name, row in progress.peaks.items()}
    return progress, int(record["mark"])


def load(path: Path, learner: Learner) -> Progress:
    """Load weights, optimizer and controllers, from a checkpoint or what ``export`` wrote; the progress starts anew.

    Raises:
        ArtifactError: they are of other models.
    """
    for name, model in _models(learner).items():
        _load_into(model, path / f"{name}.safetensors")
    _load_moments(learner.optimizer, path / OPTIMIZER)
    controllers = json.loads((path / CONTROLLERS).read_text(encoding="utf-8"))
    scaler, saved = learner.accelerator.scaler, controllers["loss_scaler"]
    if scaler is not None and saved is not None:
        scaler.load_state_dict(saved)
    return Progress(controllers["kl_coef"], controllers["lr_scale"], Running(*controllers["scores"]))


def export(directory: Path, target: Path) -> None:
    """Copy from the newest checkpoint what another training can go on from (``Trainer.start_from``)."""
    path = checkpoints.latest(directory)
    assert path is not None  # a training that has ended has saved
    target.mkdir()
    for file in (*path.glob("*.safetensors"), path / CONTROLLERS):
        shutil.copyfile(file, target / file.name)


def save_best(directory: Path, policy: Policy, update: int) -> None:
    """Keep the policy of an update as the best so far. Earlier ones go when a checkpoint knows of this one."""
    checkpoints.save(
        directory / BEST, update, lambda path: save_file(_trainable(policy), path / "policy.safetensors"), keep=update
    )


def load_best(directory: Path, policy: Policy, best: Best) -> None:
    """Load the weights that were kept.

    Raises:
        ArtifactError: they are not there any more, or damaged.
    """
    path = directory / BEST / f"checkpoint-{best.update}"
    if reason := checkpoints.problem(path):
        raise ArtifactError(f"the best policy, {path}, cannot be used: {reason}; delete {directory} to train anew")
    _load_into(policy, path / "policy.safetensors")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _models(learner: Learner) -> dict[str, nn.Module]:
    both: dict[str, nn.Module | None] = {"policy": learner.policy, "value_model": learner.value_model}
    return {name: model for name, model in both.items() if model is not None}


def drop_damaged(directory: Path, best: Best | None) -> None:
    """Delete what is newer than the last good checkpoint, and than the best policy that it knows.

    Else it would be counted among the ones that are kept, in place of them.
    """
    checkpoints.drop_after(directory, checkpoints.latest(directory))
    checkpoints.drop_after(directory / BEST, None if best is None else directory / BEST / f"checkpoint-{best.update}")


def save_batch(path: Path, batch: Any) -> None:
    """Write tensors and texts in nested dicts so that ``torch.load`` reads them without running code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(_plain(batch), path)


def _moments(optimizer: Any) -> dict[str, Tensor]:
    """AdamW's step and two moments of each weight, by the weight's number; its rates are set anew in every update."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": x.detach().cpu().contiguous() for i, values in state.items() for name, x in values.items()}


def _load_moments(optimizer: Any, path: Path) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


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
