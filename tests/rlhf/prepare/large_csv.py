"""Prepares generated CSV files: ``python large_csv.py FOLDER PART ROWS...``. Prints what each took, as lines of JSON.

Each file has a process of its own, so that its peak of resident memory is that of its data alone; they go out from one
that has the libraries. The buffers are a ``PART``-th of what they are, so that as many times fewer rows fill them.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

from rlhf.config.pipeline import PipelineConfig
from rlhf.context import Context
from rlhf.prepare import formats, output, spool, tokens
from rlhf.prepare.stage import run
from rlhf.tracking.tracker import NullTracker

WORDS = ["market", "river", "letter", "window", "engine", "garden", "winter", "signal", "doctor", "bridge"]
SENTENCES = [" ".join(WORDS[(i * 7 + j * (i % 9 + 1)) % 10] for j in range(34)) for i in range(90)]

# What is in memory at once, in rows or bytes.
BUFFERS = [
    (formats, "ROWS_AT_ONCE"), (formats, "CHARACTERS_AT_ONCE"), (spool, "WRITE"), (spool, "BUCKET"),
    (tokens, "BATCH"), (output, "ROW_GROUP"),
]  # fmt: skip


def generate(path: Path, rows: int) -> None:
    """About 500 bytes a row; a quarter of the responses has a comma, quotes and a line end."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "response", "source"])
        for row in range(rows):
            odd = ', "well"\n' if row % 4 == 0 else " "
            writer.writerow([f"Row {row}: {SENTENCES[row % 90]}", f"{SENTENCES[row * 7 % 90]}{odd}{row}", row % 97])


def peak_resident_bytes() -> int:
    """Of this program alone: what ``getrusage`` gives counts the process that started it, up to then."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def prepared(rows: int, folder: Path, model: Path) -> dict[str, Any]:
    """What preparing so many rows took."""
    folder.mkdir()
    file = folder / "large.csv"
    generate(file, rows)
    config = PipelineConfig.model_validate({
        **dict.fromkeys(("sft", "judge", "reward", "ppo", "evaluate"), "off"),
        "data": {"demonstrations": str(file)},
        "model": {"path": str(model)},
    })  # fmt: skip
    (folder / "out").mkdir()
    start = time.process_time()
    finals = run(Context("prepare", config, {}, folder / "out", folder / "work", NullTracker()))
    seconds = time.process_time() - start
    peak, size = peak_resident_bytes(), file.stat().st_size
    file.unlink()
    kept = sum(finals[f"prepare/demonstrations_{split}"] for split in ("train", "validation", "test"))
    return {"rows": kept, "bytes": size, "cpu_seconds": seconds, "peak_bytes": peak}


def prepare(rows: int, folder: Path, model: Path) -> None:
    """Print what it took once all is loaded that loads at its first use."""
    prepared(300, folder.with_suffix(".first"), model)
    print(json.dumps(prepared(rows, folder, model)), flush=True)


def main() -> None:
    folder, part, fork = Path(sys.argv[1]), int(sys.argv[2]), multiprocessing.get_context("fork")
    for module, name in BUFFERS:
        setattr(module, name, getattr(module, name) // part)
    for number, rows in enumerate(sys.argv[3:]):
        process = fork.Process(target=prepare, args=(int(rows), folder / str(number), folder / "model"))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
