"""Prepares a generated CSV file and prints what it took, as JSON: ``python large_csv.py ROWS FOLDER``.

A process of its own, so that its peak of resident memory is that of this data alone.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path

WORDS = ["market", "river", "letter", "window", "engine", "garden", "winter", "signal", "doctor", "bridge"]
SENTENCES = [" ".join(WORDS[(i * 7 + j * (i % 9 + 1)) % 10] for j in range(34)) for i in range(90)]


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


def main() -> None:
    rows, folder = int(sys.argv[1]), Path(sys.argv[2])
    from rlhf.config.pipeline import PipelineConfig
    from rlhf.context import Context
    from rlhf.prepare.stage import run
    from rlhf.tracking.tracker import NullTracker

    generate(folder / "large.csv", rows)
    config = PipelineConfig.model_validate({
        **dict.fromkeys(("sft", "judge", "reward", "ppo", "evaluate"), "off"),
        "data": {"demonstrations": str(folder / "large.csv")},
        "model": {"path": str(folder / "model")},
    })  # fmt: skip
    (folder / "out").mkdir()
    start = time.process_time()
    finals = run(Context("prepare", config, {}, folder / "out", folder / "work", NullTracker()))
    seconds = time.process_time() - start
    peak = peak_resident_bytes()
    kept = sum(finals[f"prepare/demonstrations_{split}"] for split in ("train", "validation", "test"))
    size = (folder / "large.csv").stat().st_size
    print(json.dumps({"rows": kept, "bytes": size, "cpu_seconds": seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
