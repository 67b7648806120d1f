"""What a stage is given to work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import ArtifactError
from rlhf.stages import STAGES
from rlhf.tracking.stopping import Stop

if TYPE_CHECKING:
    from rlhf.config.pipeline import PipelineConfig
    from rlhf.tracking.tracker import Tracker


@dataclass(frozen=True)
class Context:
    """The surroundings of one attempt at one stage.

    ``inputs`` maps each earlier stage that is on to its artifact's directory. ``out`` is a fresh, empty directory
    that is published when the stage returns. ``checkpoints`` survives a kill: the next attempt finds it as it was.
    A training that finds ``stop`` asked ends at its next step, with a checkpoint, by a ``StoppedError``.
    """

    stage: str
    config: PipelineConfig
    inputs: Mapping[str, Path]
    out: Path
    checkpoints: Path
    tracker: Tracker
    stop: Stop = field(default_factory=Stop)

    def has(self, path: str) -> bool:
        """Whether an input is there: ``has("sft/model")`` is false when the sft stage is off."""
        return path.split("/")[0] in self.inputs and self.input(path).exists()

    def input(self, path: str) -> Path:
        """The place of an input such as ``"prepare/prompts/train.parquet"``.

        Raises:
            ArtifactError: the stage did not declare this input in ``rlhf.stages`` (its cache key would not see it
                change), or the stage it comes from is off.
        """
        source, _, rest = path.partition("/")
        part = rest.split("/")[0]
        if part not in STAGES[self.stage].inputs.get(source, ()):
            raise ArtifactError(f"stage {self.stage} reads {path!r}, which it does not declare in rlhf/stages.py")
        if source not in self.inputs:
            raise ArtifactError(f"stage {self.stage} needs {path!r}, but the stage {source} is off")
        return self.inputs[source] / rest

    def base_model(self) -> str:
        """The policy before any training: what ``prepare`` made from random weights, or ``model.path``."""
        return str(self.config.model.path or self.input("prepare/base"))

    def sft_model(self) -> str:
        """The supervised policy; the base model where the sft stage is off."""
        return str(self.input("sft/model")) if "sft" in self.inputs else self.base_model()

    def model_options(self, path: str) -> dict[str, Any]:
        """How ``rlhf.models.loading`` opens a model; ``model.revision`` is that of ``model.path`` only."""
        model = self.config.model
        return {
            "revision": model.revision if path == model.path else None,
            "trust_remote_code": model.trust_remote_code,
        }

    def policy_model(self) -> str:
        """The policy after PPO; the SFT policy where the ppo stage is off."""
        return str(self.input("ppo/model")) if "ppo" in self.inputs else self.sft_model()
