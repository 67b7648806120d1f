"""What the trials of faults gave, as the table of docs/reliability.md.

RLHF_FAULT_OUTCOMES=FILE make faults
python -m tests.faults.report FILE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """One fault at one moment; times in seconds.

    ``after``: from the moment that the run was asked for. ``same_result``: weights equal those of the undisturbed run.
    ``asked``: how often a person asked for the run. ``updates_twice``: updates of PPO that were computed again.
    """

    seed: int
    fault: str
    what: str
    after: float
    same_result: bool
    asked: int
    seconds_lost: float
    stages_twice: int
    updates_twice: int
    processes_left: list[str]
    runs_left: list[str]


HEAD = (
    "| what happens | at seconds | recovered, same weights | asked for again | seconds lost | stages computed twice "
    "| updates computed twice | processes left | runs left Running |\n|---|---|---|---|---|---|---|---|---|\n"
)


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row for each fault, over its moments."""
    rows = []
    for name in dict.fromkeys(outcome.fault for outcome in outcomes):
        found = sorted((outcome for outcome in outcomes if outcome.fault == name), key=lambda outcome: outcome.after)
        rows.append(
            f"| {found[0].what} "
            f"| {', '.join(f'{outcome.after:.1f}' for outcome in found)} "
            f"| {sum(outcome.same_result for outcome in found)} of {len(found)} "
            f"| {sum(outcome.asked > 1 for outcome in found)} "
            f"| {', '.join(f'{outcome.seconds_lost:.0f}' for outcome in found)} "
            f"| {sum(outcome.stages_twice for outcome in found)} "
            f"| {sum(outcome.updates_twice for outcome in found)} "
            f"| {sum(len(outcome.processes_left) for outcome in found)} "
            f"| {sum(len(outcome.runs_left) for outcome in found)} |\n"
        )
    seeds = ", ".join(map(str, sorted({outcome.seed for outcome in outcomes})))
    return f"{len(outcomes)} trials, seed {seeds}.\n\n{HEAD}{''.join(rows)}"


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    print(table([Outcome(**json.loads(line)) for line in lines]), end="")
