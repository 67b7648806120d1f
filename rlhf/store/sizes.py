"""How much something takes, in words."""

from __future__ import annotations


def size(count: int) -> str:
    """Bytes as ``1.2 MB``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.95:  # more is written as 1000.0
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
