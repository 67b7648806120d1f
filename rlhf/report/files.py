"""The report of a run as a file, ``<home>/runs/<run id>/report.html``."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf.report.page import page
from rlhf.report.sources import sources_of
from rlhf.runs.records import REPORT, RunRecord
from rlhf.store.artifacts import Store


def write(record: RunRecord, store: Store) -> Path:
    """Write the report of a run from what its stages left; where it is.

    Raises:
        OSError: it cannot be written.
    """
    path = store.home / "runs" / record.id / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page(sources_of(record, store)), encoding="utf-8")
    os.replace(temporary, path)
    return path.resolve()
