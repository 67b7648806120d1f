"""How long `rlhf run` takes when all is up to date: runs the demo at smoke size once, then times further runs.

    python tests/bench/up_to_date.py [RUNS]

Prints JSON: seconds of each run as a whole process, beside those of `python -c pass` and of importing torch alone.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time


def seconds(command: list[str], home: str) -> float:
    """Wall time of one process, which must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "RLHF_HOME": home})
    return time.perf_counter() - start


def main(runs: int) -> None:
    """Measure, alternately, and print."""
    run = [sys.executable, "-m", "flows.commands.cli", "run", "demo", "--size", "smoke"]
    commands = {
        "rlhf run": run,
        "python": [sys.executable, "-c", "pass"],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    with tempfile.TemporaryDirectory() as home:
        first = seconds(run, home)
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(runs):
            for name, command in commands.items():
                times[name].append(seconds(command, home))
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    print(json.dumps({
        "first_run_seconds": round(first, 1),
        "median_seconds": medians,
        "ratio_to_import_torch": round(medians["rlhf run"] / medians["import torch"], 2),
        "each": {name: [round(value, 3) for value in values] for name, values in times.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
