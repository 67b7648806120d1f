"""A training that ends itself by kill -9 at a place that the command line names."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from conftest import new_trainer

from rlhf.store import checkpoints


def kill(*arguments: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


where, folder, changes = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
trainer = new_trainer(folder, **changes)
step, seal = trainer.step, checkpoints.seal


def step_that_dies(update: int) -> dict[str, float]:
    """At update 4, the first after a checkpoint that is not the last."""
    if update == 4 and where == "rollout":
        forward = trainer.policy.language_model.base_model.register_forward_hook
        calls = iter(range(3))
        forward(lambda *a: None if next(calls, None) is not None else kill())
    if update == 4 and where == "epoch":
        taken = iter(range(2))
        trainer.learner.optimizer.optimizer.register_step_post_hook(lambda *a: kill() if next(taken, 0) == 1 else None)
    if update == 6 and where == "checkpoint":
        # everything is written but the manifest that vouches for it
        checkpoints.seal = lambda path: kill() if path.parent == folder else seal(path)
    return step(update)


trainer.step = step_that_dies  # type: ignore[method-assign]
trainer.train()
