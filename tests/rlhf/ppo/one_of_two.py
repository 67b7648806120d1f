"""One process of a distributed training: what its first update computes, into a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from conftest import first_update, new_trainer

trainer = new_trainer(Path(sys.argv[1]), **json.loads(sys.argv[3]))
result = first_update(trainer)
trainer.save()
if trainer.accelerator.is_main_process:
    torch.save(result, sys.argv[2])
