"""A pipeline's process, for tests that kill it: runs the stage that a JSON file describes in two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rlhf.config.pipeline import PipelineConfig
from rlhf.context import Context
from rlhf.tracking.tracker import NullTracker
from tasks.processes import launch

if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    config = PipelineConfig.model_validate(given["config"])
    inputs = {stage: Path(path) for stage, path in given["inputs"].items()}
    context = Context("ppo", config, inputs, Path(given["out"]), Path(given["checkpoints"]), NullTracker())
    launch.run(context, context.checkpoints / "metrics.jsonl", lambda event: None)
