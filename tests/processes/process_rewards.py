"""Reward functions that let one of two processes fail, or kill another; the other one waits."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rlhf.ppo import core


def meet() -> int:
    """The number of this process, once both have written their id."""
    place, rank = Path(os.environ["TEST_PIDS"]), int(os.environ["RANK"])
    for name, pid in ((f"{rank}", str(os.getpid())), ("launcher", os.environ["RLHF_LAUNCHER"])):
        (place / f".{name}-{rank}").write_text(pid)
        (place / f".{name}-{rank}").rename(place / name)  # it is there whole, whenever someone is killed
    while not all((place / name).exists() for name in "01"):
        time.sleep(0.01)
    return rank


def good(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    print("printed by", meet())
    return [float(len(response)) for response in responses]


def plain(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def waits(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    meet()
    time.sleep(1000)
    return []


def talks(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Takes some seconds, and has something to say all the time."""
    meet()
    for _ in range(60):
        print("talking", flush=True)
        time.sleep(0.05)
    return plain(prompts, responses)


def stubborn(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Waits, and does not listen to SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    while True:
        waits(prompts, responses)


def raises(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    if meet() == 1:
        raise ValueError("no such word")
    return good(prompts, responses)


def breaks(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Not the reward fails, but what comes after it."""
    if meet() == 1:
        del core.token_rewards
    return good(prompts, responses)


def exits(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    if meet() == 1:
        print("going", file=sys.stderr, flush=True)
        os._exit(7)
    return good(prompts, responses)


def killed(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    if meet() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return good(prompts, responses)


def kills_launcher(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    if meet() == 1:
        os.kill(int(os.environ["RLHF_LAUNCHER"]), signal.SIGKILL)
    return stubborn(prompts, responses)


def terminates_launcher(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    if meet() == 1:
        os.kill(int(os.environ["RLHF_LAUNCHER"]), signal.SIGTERM)
    return waits(prompts, responses)
