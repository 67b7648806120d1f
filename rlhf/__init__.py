"""RLHF as a library: everything that knows about text, models and learning. No orchestration in here."""

__version__ = "0.1.0"
