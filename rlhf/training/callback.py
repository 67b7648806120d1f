"""What a Hugging Face Trainer tells a stage: numbers for its tracker, checkpoints to be sealed, and when to end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.errors import TrainingError
from rlhf.store import checkpoints
from rlhf.training import processes

if TYPE_CHECKING:
    from rlhf.context import Context

MARK = "journal.json"  # in a checkpoint: how far the journal was
HALVINGS = 16  # that bring the first loss scale of fp16 from 65536 to 1
# What a Trainer logs, by the name it has here; anything else (run times, floating-point operations) is left out.
CURVES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "accuracy": "accuracy",
    "margin": "margin",
    "mean_reward": "score_mean",
    "min_reward": "score_min",
    "max_reward": "score_max",
}


class PipelineCallback(TrainerCallback):  # type: ignore[misc]
    """Sends a Trainer's numbers to the stage's tracker, and seals its checkpoints.

    ``evaluate`` is called after each epoch but the last one; what it returns is logged under the stage's name.
    """

    def __init__(self, context: Context, evaluate: Callable[[], Mapping[str, float]] | None = None) -> None:
        self._context = context
        self._evaluate = evaluate
        self._loss = math.nan
        self._overflows = 0  # of fp16, in a row

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        values = {name: float(logs[key]) for key, name in CURVES.items() if key in logs}
        if not values:  # the summary after the last step
            return
        overflow = args.fp16 and not math.isfinite(values.get("grad_norm", 0.0))
        self._overflows = self._overflows + 1 if overflow else 0
        if overflow and self._overflows <= HALVINGS:  # the step was skipped, and the next ones have a smaller scale
            del values["grad_norm"]
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(not_finite(name, value, self._context.stage, state.global_step))
        self._loss = values["loss"]
        log_values(self._context, values, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        live = {} if math.isnan(self._loss) else {"loss": self._loss}
        self._context.tracker.progress(state.global_step, state.max_steps, **live)
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last steps too, where log_every does not divide their number
        elif self._evaluate is not None and float(state.epoch or 0.0).is_integer():
            log_values(self._context, self._evaluate(), state.global_step)
            kwargs["model"].train()  # in evaluation mode, TRL would put the metrics of the next log aside
        if state.global_step < state.max_steps and processes.anyone(self._context.stop.asked):
            control.should_log = True  # a Trainer forgets at a resume what it has averaged since the last log
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        directory = Path(str(args.output_dir))
        path = directory / f"checkpoint-{state.global_step}"
        processes.wait()  # each has written its own random numbers' state
        if processes.index():
            return
        (path / MARK).write_text(json.dumps({"mark": self._context.tracker.mark()}), encoding="utf-8")
        checkpoints.seal(path)
        checkpoints.prune(directory)


def log_values(context: Context, values: Mapping[str, float], step: int) -> None:
    """Log values under the stage's name; nothing where there are none."""
    if values:
        context.tracker.log({f"{context.stage}/{name}": value for name, value in values.items()}, step)


def not_finite(name: str, value: float, stage: str, step: int) -> str:
    """What a training says that ends because of a number."""
    return (
        f"{stage}: the {name} is {value} at step {step}; the last good checkpoint is kept. Lower {stage}.learning_rate "
        f"or {stage}.max_grad_norm, or look for broken rows in the data"
    )
