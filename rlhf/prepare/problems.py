"""Rows that cannot be used: gathered for one message, or kept in quarantine."""

from __future__ import annotations

import json
from bisect import insort
from collections import Counter
from pathlib import Path
from typing import Any

from rlhf.errors import DataError

SHOWN = 5  # bad rows that a message names; the others are counted


class Quarantine:
    """A file of JSON lines with the rows that were skipped: setting, place, reason, problem, and the row itself."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, setting: str, place: str, reason: str, problem: str, row: Any) -> None:
        entry = {"setting": setting, "place": place, "reason": reason, "problem": problem, "row": row}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=True, default=str) + "\n")


class BadRows:
    """What is wrong with rows, in the order of the input.

    With a ``quarantine``, the rows go there and are counted in ``skipped`` by reason; without, ``check`` raises.
    """

    def __init__(self, where: str, what: str = "bad", quarantine: Quarantine | None = None) -> None:
        self._title = where, what
        self._quarantine = quarantine
        self._first: list[tuple[int, str]] = []
        self.count = 0
        self.skipped: Counter[str] = Counter()

    def add(self, place: str, problem: str, *, order: int | None = None, reason: str = "bad", row: Any = None) -> None:
        """Add a row; ``order`` is its number in the input where rows come in another order."""
        if self._quarantine is not None:
            self._quarantine.add(self._title[0], place, reason, problem, row)
            self.skipped[reason] += 1
            return
        insort(self._first, (self.count if order is None else order, f"{place}: {problem}"))
        del self._first[SHOWN:]
        self.count += 1

    def check(self, advice: str) -> None:
        """Raise unless no row was added.

        Raises:
            DataError: names the first rows, counts all, and ends with ``advice``.
        """
        if not self.count:
            return
        (where, what), rows = self._title, "row is" if self.count == 1 else "rows are"
        more = [f"... and {self.count - SHOWN} more"] if self.count > SHOWN else []
        lines = "\n  ".join([f"{where}: {self.count} {rows} {what}", *(line for _, line in self._first), *more])
        raise DataError(f"{lines}\n{advice}")
