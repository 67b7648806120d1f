"""Ending a training early and whole: at its next step, with a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stop:
    """What a training looks at after every step. Whoever wants it to end sets ``asked``, from any thread."""

    asked: bool = False
