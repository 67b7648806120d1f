"""Stages in two processes: what reaches the pipeline, which error, and that no process is ever left behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rlhf.config.pipeline import PipelineConfig
from rlhf.context import Context
from rlhf.errors import ConfigError, DataError, RewardError
from rlhf.models import loading
from rlhf.ppo import stage
from rlhf.prepare.random_weights import random_model
from rlhf.prepare.tokens import train_tokenizer
from rlhf.store import checkpoints
from rlhf.tracking.tracker import Entry, NullTracker, Progress, read_journal
from tasks.processes import launch
from tasks.processes.messages import decode, encode

Make = Callable[..., Context]
NAMES = ("0", "1", "launcher")
WORDS = ["ant", "bee", "cat", "dog", "eel", "fox"]
REWARDS = Path(__file__).with_name("process_rewards.py")


@pytest.fixture
def make_ppo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Context]:
    """A function that makes a context of the ppo stage for two processes, with a function of ``process_rewards``.

    Each process writes its id into the folder ``tmp_path/pids``.
    """
    torch.set_num_threads(1)
    (tmp_path / "pids").mkdir()
    monkeypatch.setenv("TEST_PIDS", str(tmp_path / "pids"))
    size = {"layers": 1, "width": 8, "heads": 2, "context": 32, "vocab_size": 260}

    def make(function: str, prompts: int = 6, **resources: Any) -> Context:
        config = PipelineConfig.model_validate(
            {
                "data": {"demonstrations": "x.jsonl"},
                "model": {"init": "random", **size},
                "resources": {"device": "cpu", "threads": 2, "processes": 2, **resources},
                "judge": "off",
                "reward": "off",
                "ppo": {"updates": 2, "episodes": 4, "max_new_tokens": 4, "rewards": {f"{REWARDS}:{function}": 1.0}},
                "evaluate": {"max_new_tokens": 4},
            }
        )
        tokenizer = train_tokenizer(WORDS, 260, 32)
        torch.manual_seed(0)
        loading.save(random_model(config.model, tokenizer), tokenizer, tmp_path / "sft/model")
        path = tmp_path / "prepare/prompts/train.parquet"
        path.parent.mkdir(parents=True)
        schema = pa.schema([("prompt", pa.string())])
        pq.write_table(pa.Table.from_pylist([{"prompt": f"{word}\n"} for word in WORDS[:prompts]], schema), path)
        for name in ("out", "checkpoints"):
            (tmp_path / name).mkdir()
        inputs = {"prepare": tmp_path / "prepare", "sft": tmp_path / "sft"}
        return Context("ppo", config, inputs, tmp_path / "out", tmp_path / "checkpoints", NullTracker())

    return make


class Kept(NullTracker):
    """Keeps what is logged."""

    def __init__(self, kept: list[dict[str, float]]) -> None:
        self._kept = kept

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._kept.append(dict(values))


def run(context: Context, listener: Callable[[Entry | Progress], None] = lambda event: None) -> dict[str, float]:
    return launch.run(context, context.checkpoints.parent / "metrics.jsonl", listener)


def pids(place: Path, names: tuple[str, ...] = NAMES) -> list[int]:
    """Of the processes, when all have told them."""
    deadline = time.monotonic() + 120
    while not all((place / "pids" / name).exists() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.1)
    return [int((place / "pids" / name).read_text()) for name in names]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_gone(found: list[int], seconds: float = 0.0) -> None:
    deadline = time.monotonic() + seconds
    while any(map(alive, found)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in found if alive(pid)] == []


@pytest.mark.slow
def test_what_the_processes_say(make_ppo: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Entry | Progress] = []
    with caplog.at_level(logging.INFO):
        metrics = run(make_ppo("good"), heard.append)
    assert metrics["ppo/episodes"] == 8.0
    assert [event for event in heard if isinstance(event, Entry)] == list(read_journal(tmp_path / "metrics.jsonl"))
    assert [event.done for event in heard if isinstance(event, Progress)] == [1, 2]
    assert {"printed by 0", "printed by 1"} <= set(caplog.messages)
    assert (tmp_path / "out/model/model.safetensors").is_file()
    assert_gone(pids(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kind"), [(2, "MULTI_GPU"), (1, "NO")])
def test_a_file_of_accelerate_config(processes: int, kind: str, make_ppo: Make, tmp_path: Path) -> None:
    """It is read, but its precision changes no number; a wrong one is what the error shows."""
    file = tmp_path / "file.yaml"
    content = f"compute_environment: LOCAL_MACHINE\ndistributed_type: {kind}\nuse_cpu: false\ndebug: true\n"
    file.write_text(f"{content}mixed_precision: bf16\nnum_processes: {processes}\n")
    context = make_ppo("plain", processes=processes, accelerate_config=str(file))
    seen: list[dict[str, float]] = []
    run(context, lambda event: seen.append(event.values) if isinstance(event, Entry) else None)
    assert len(seen) == 2

    expected: list[dict[str, float]] = []
    alone = replace(context, out=tmp_path / "alone", checkpoints=tmp_path / "alone/checkpoints", tracker=Kept(expected))
    alone.out.mkdir()
    stage.run(alone)
    for name in ("ppo/policy_loss", "ppo/value_loss", "ppo/grad_norm", "ppo/kl"):
        assert [values[name] for values in seen] == pytest.approx([values[name] for values in expected], abs=1e-5), name

    file.write_text(f"{content}num_processes: {processes}\nnum_proceses: 3\n")
    with pytest.raises(
        RuntimeError, match=r"ended with exit code 1: ValueError: .*unknown keys \(\['num_proceses'\]\)"
    ):
        run(context)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        ("raises", RewardError, r"ppo update 1: .*ValueError: no such word.*\(rank 1 of 2\)$"),
        ("breaks", RuntimeError, r"^ppo: rank 1 of 2 failed: AttributeError: .*token_rewards"),
        ("exits", RuntimeError, r"^ppo: rank 1 of 2 ended with exit code 7\n"),
        ("killed", RuntimeError, r"^ppo: rank 1 of 2 was killed by signal 9 \(SIGKILL\); did the machine run out"),
        (
            "kills_launcher",
            RuntimeError,
            r"^ppo: the launcher of its 2 process\(es\) was killed by signal 9 \(SIGKILL\)",
        ),
        (
            "terminates_launcher",
            RuntimeError,
            r"^ppo: the launcher of its 2 process\(es\) was killed by signal 15 \(SIGTERM\)\n",
        ),
    ],
)
def test_a_failure_ends_all_and_names_the_process(
    function: str, kind: type[Exception], message: str, make_ppo: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(kind, match=message) as caught:
        run(make_ppo(function))
    assert_gone(pids(tmp_path))
    told = caplog.text + "\n".join(getattr(caught.value, "__notes__", []))
    assert ("in breaks" in told or "Traceback" in told) or function not in ("raises", "breaks")
    assert "going" in told or function != "exits"


@pytest.mark.slow
def test_bad_input_stays_bad_input(make_ppo: Make) -> None:
    with pytest.raises(DataError, match=r"train.parquet has no row, .* \(rank [01] of 2\)$"):
        run(make_ppo("good", prompts=0))


@pytest.mark.slow
@pytest.mark.parametrize("function", ["waits", "stubborn", "talks"])
def test_a_cancelled_pipeline_leaves_no_process(
    function: str, make_ppo: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cancellation is an exception in the main thread, like Ctrl-C. Who can end the step that it is in does so."""
    monkeypatch.setattr(launch, "GRACE_SECONDS", 15.0 if function == "talks" else 2.0)
    caplog.set_level(logging.INFO)
    context = make_ppo(function)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    script = f"import os, time, pathlib\nwhile not all((pathlib.Path({str(tmp_path / 'pids')!r}) / n).exists() for n in"
    script += f" {NAMES!r}): time.sleep(0.05)\ntime.sleep(0.5)\nos.kill({os.getpid()}, {int(signal.SIGUSR1)})"
    before = signal.signal(signal.SIGUSR1, interrupt)
    canceller = subprocess.Popen([sys.executable, "-c", script])
    try:
        with pytest.raises(KeyboardInterrupt):
            run(context)
    finally:
        canceller.kill()
        canceller.wait()
        signal.signal(signal.SIGUSR1, before)
    assert_gone(pids(tmp_path))
    if function == "talks":
        assert checkpoints.latest(context.checkpoints) is not None
        assert caplog.text.count("talking") == 2 * 60


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_pipeline_leaves_no_process(by: signal.Signals, make_ppo: Make, tmp_path: Path) -> None:
    context = make_ppo("stubborn")
    given = {"config": context.config.model_dump(mode="json"), "inputs": context.inputs}
    given |= {"out": context.out, "checkpoints": context.checkpoints}
    (tmp_path / "given.json").write_text(json.dumps(given, default=str))
    with (tmp_path / "log").open("wb") as log:
        script = str(Path(__file__).with_name("launching.py"))
        pipeline = subprocess.Popen([sys.executable, script, str(tmp_path / "given.json")], stdout=log, stderr=log)
        try:
            found = pids(tmp_path)
            assert all(map(alive, found))
            pipeline.send_signal(by)
            pipeline.wait(30)
        finally:
            pipeline.kill()
    assert_gone(found, seconds=5)


def test_devices_that_are_not_there(make_ppo: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"resources.processes is 2, but torch sees 1 CUDA device\(s\)"):
        run(make_ppo("good", device="auto"))


@pytest.mark.parametrize("event", [Entry(5, 3, {"a": 1.5, "b": float("inf")}), Progress(1, 9, {}), Entry(1, 2, {})])
def test_events_cross_the_pipe(event: Entry | Progress) -> None:
    assert decode(encode(event)) == event
    assert encode(event).count("\n") == 1
