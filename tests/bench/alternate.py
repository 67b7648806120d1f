"""Two benchmarks in turn on one machine, and the ratio of their seconds per update.

    python tests/bench/alternate.py ROUNDS 'COMMAND A' 'COMMAND B'

Each command ends with a line of JSON that has the seconds of each of its updates, as ``ppo_update.py`` does
(``seconds_each`` or ``s_each``). A round runs both, the first one last in the next round. Prints JSON: the ratio A / B
of each round's medians, their median and quartiles, and the median seconds of each.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys


def seconds(command: str) -> float:
    """Median seconds of an update of one run."""
    done = subprocess.run(shlex.split(command), check=True, stdout=subprocess.PIPE, text=True)
    said = json.loads(done.stdout.strip().splitlines()[-1])
    return statistics.median(said["seconds_each"] if "seconds_each" in said else said["s_each"])


def main(rounds: int, first: str, second: str) -> None:
    """Measure, alternately, and print."""
    times: dict[str, list[float]] = {first: [], second: []}
    for turn in range(rounds):
        for command in (first, second) if turn % 2 == 0 else (second, first):
            times[command].append(seconds(command))
    ratios = [a / b for a, b in zip(times[first], times[second], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    print(
        json.dumps(
            {
                "ratio": {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]},
                "ratios": [round(ratio, 3) for ratio in ratios],
                "seconds": {command: round(statistics.median(each), 3) for command, each in times.items()},
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
