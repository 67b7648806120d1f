"""One process of a distributed training: what its first update computes, into a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from conftest import Recorder, first_update, new_trainer

# One process has one micro-batch, the other several: they must meet all the same.
budget = 1000 if os.environ["RANK"] == "0" else 20
trainer = new_trainer(Path(sys.argv[1]), **json.loads(sys.argv[3]), micro_batch_tokens=budget)
result = first_update(trainer)
trainer.save()
assert isinstance(trainer.tracker, Recorder) == trainer.accelerator.is_main_process  # one of them keeps the journal
if trainer.accelerator.is_main_process:
    torch.save(result, sys.argv[2])
