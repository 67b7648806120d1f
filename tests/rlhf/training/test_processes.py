"""Trainings in two processes (gloo, on the CPU) give what one process gives; and each one's share of the batches."""

from __future__ import annotations

import importlib
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState
from trl import RewardConfig

from rlhf.config.model import Model
from rlhf.context import Context
from rlhf.models import loading
from rlhf.prepare.random_weights import random_model
from rlhf.sft import stage as sft
from rlhf.stages import STAGES
from rlhf.store import checkpoints
from rlhf.tracking.tracker import Entry, Progress, read_journal
from rlhf.training import computing, processes, supervised
from tasks.processes import launch
from tests import quick_python

CLOSE = {"rel": 1e-5, "abs": 1e-5}
OF_ONE_PROCESS = ("ppo/seconds", "ppo/tokens_per_second", "ppo/peak_memory_bytes")
STEADY: dict[str, Any] = {"learning_rate": 1e-3, "log_every": 1, "epochs": 3, "checkpoint_every": 2}
ROWS = 85  # with 28 in a batch, 4 steps an epoch; the last batch has one row, and nothing for the second process
PPO: dict[str, Any] = {"updates": 3, "episodes": 8, "epochs": 2, "max_new_tokens": 8, "learning_rate": 1e-3}
PPO |= {"eval_every": 2, "checkpoint_every": 1}


def in_one(context: Context) -> dict[str, float]:
    """The stage as its task calls it for one process."""
    finals: dict[str, float] = importlib.import_module(STAGES[context.stage].module).run(context)
    return finals


def in_two(context: Context, listener: Any = None, new: bool = False) -> dict[str, float]:
    """The stage in two processes; these and their launcher are forked from one with the libraries, or ``new``."""
    resources = context.config.resources.model_copy(update={"processes": 2, "threads": 2})
    config = context.config.model_copy(update={"resources": resources})
    with pytest.MonkeyPatch.context() as patch:
        if not new:
            patch.setenv("PYTHON_EXEC", quick_python.executable())  # what torch's agent starts
            patch.setattr(sys, "executable", quick_python.executable())
        return launch.run(replace(context, config=config), journal(context), listener or [].append)


def journal(context: Context) -> Path:
    return context.checkpoints.parent / "metrics.jsonl"


def weights(context: Context) -> dict[str, torch.Tensor]:
    return load_file(context.out / "model/model.safetensors")


def assert_same(one: Context, two: Context, finals: list[dict[str, float]]) -> None:
    """Final figures, every point of every curve, and the weights."""
    assert finals[1] == pytest.approx(finals[0], **CLOSE)
    curves = [list(read_journal(journal(context))) for context in (one, two)]
    assert [(e.step, e.values.keys()) for e in curves[0]] == [(e.step, e.values.keys()) for e in curves[1]]
    for a, b in zip(*curves, strict=True):
        for name, value in a.values.items():
            if not name.startswith(OF_ONE_PROCESS):
                assert b.values[name] == pytest.approx(value, **CLOSE), (name, a.step)
    old, new = weights(one), weights(two)
    assert old.keys() == new.keys()
    assert max((old[name] - new[name]).abs().max().item() for name in old) < 1e-5


@pytest.fixture
def odd(toy: Any, tmp_path: Path) -> Any:
    """The toy pipeline with a number of demonstrations, rankings and ratings that leaves one for the last batch."""
    shared = shutil.copytree(toy.shared, tmp_path / "shared")
    path = shared / "prepare/demonstrations/train.parquet"
    pq.write_table(pq.read_table(path).slice(0, ROWS), path)
    return type(toy)(shared, tmp_path)


# ---------------------------------------------------------------------------------------- the same as in one process
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "t5", "lora"])
def test_sft(kind: str, odd: Any) -> None:
    if kind == "t5":
        tokenizer = loading.load_tokenizer(odd.shared / "prepare/base")
        torch.manual_seed(1)
        size = {"layers": 1, "width": 16, "heads": 2, "context": 48, "vocab_size": 270}
        model = random_model(Model(init="random", architecture="t5", **size), tokenizer)
        loading.save(model, tokenizer, odd.shared / "prepare/base")
    more = {"model": {"lora_rank": 2}} if kind == "lora" else {}
    section = STEADY | {"batch_size": 28}
    one = odd.context("sft", run="one", sft=section, **more)
    two = odd.context("sft", run="two", sft=section | ({} if kind == "t5" else {"micro_batch_size": 4}), **more)
    heard: list[Entry | Progress] = []
    assert_same(one, two, [in_one(one), in_two(two, heard.append)])
    assert [event for event in heard if isinstance(event, Entry)] == list(read_journal(journal(two)))
    assert [event.done for event in heard if isinstance(event, Progress)] == list(range(1, 13))


def rankings() -> dict[str, list[Any]]:
    """13 rankings of two or three responses: the more often one says ``ant``, the better."""
    rows = []
    for number in range(13):
        size = 2 + number % 2
        responses = [" ".join(["ant"] * (size - i) + ["no"] * i) for i in range(size)]
        rows += [(f"bee {number}\n", better, worse, number) for better, worse in combinations(responses, 2)]
    return dict(zip(("prompt", "chosen", "rejected", "ranking"), map(list, zip(*rows, strict=True)), strict=True))


def ratings() -> dict[str, list[Any]]:
    texts = [" ".join(["ant"] * (i % 5 + 1)) for i in range(29)]
    return {"prompt": ["bee\n"] * 29, "response": texts, "score": [float(len(text)) for text in texts]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "section"),
    [
        # Four rankings in a batch, one in the last. Without `center`, only rounding decides on the level of scores,
        # and AdamW makes whole steps of it.
        ({"preferences": rankings()}, {"batch_size": 12, "center": 0.1, "held_out": True}),
        ({"ratings": ratings()}, {"batch_size": 14, "objective": "regression"}),
    ],
)
def test_reward(columns: Mapping[str, Any], section: dict[str, Any], odd: Any) -> None:
    for kind, table in columns.items():
        for split in ("train", "validation", "test"):
            path = odd.shared / f"prepare/{kind}/{split}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.table(table), path)
    contexts = [odd.context("reward", run=name, reward=STEADY | section) for name in ("one", "two")]
    assert_same(*contexts, [in_one(contexts[0]), in_two(contexts[1])])
    if "held_out" in section:
        second = [load_file(context.out / "held_out/model.safetensors") for context in contexts]
        assert max((second[0][name] - second[1][name]).abs().max().item() for name in second[0]) < 1e-5
        assert any(not torch.equal(second[0][name], weight) for name, weight in weights(contexts[0]).items())
    name = "scores.parquet" if "preferences" in columns else "ratings.parquet"
    a, b = (pq.read_table(context.out / name).drop(["split"]).to_pydict() for context in contexts)
    assert a.keys() == b.keys()
    assert all(b[column] == pytest.approx(values, **CLOSE) for column, values in a.items())


def write_prompts(odd: Any) -> None:
    rows = [{"prompt": f"{a} {b}\n", "reference": a} for a in ("ant", "bee", "cat") for b in ("dog", "eel")]
    for split in ("train", "validation"):
        path = odd.shared / f"prepare/prompts/{split}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.slow
def test_ppo(odd: Any) -> None:
    write_prompts(odd)
    more = {"reward": "off", "ppo": PPO | {"rewards": {"brevity": 1.0}, "best_metric": "score"}}
    contexts = [replace(odd.context("sft", run=name, **more), stage="ppo") for name in ("one", "two")]
    assert_same(*contexts, [in_one(contexts[0]), in_two(contexts[1])])
    state = [load_file(context.out / "value_model/model.safetensors") for context in contexts]
    assert max((state[0][name] - state[1][name]).abs().max().item() for name in state[0]) < 1e-5
    assert sorted(path.name for path in contexts[1].out.iterdir()) == sorted(p.name for p in contexts[0].out.iterdir())


# ---------------------------------------------------------------------------------------------------------- resuming
@pytest.mark.slow
def test_a_training_that_was_cancelled_goes_on_in_two_processes_to_the_same_bits_and_in_one(odd: Any) -> None:
    def cancel(event: Entry | Progress) -> None:
        if isinstance(event, Progress) and event.done == 7:  # in the second epoch, which began with step 5
            raise KeyboardInterrupt

    section = STEADY | {"batch_size": 28}
    whole = odd.context("sft", run="whole", sft=section)
    finals = in_two(whole)
    with pytest.raises(KeyboardInterrupt):
        in_two(odd.context("sft", run="killed", sft=section), cancel, new=True)
    latest = checkpoints.latest(odd.directory / "killed/checkpoints")
    assert latest is not None
    assert 7 <= checkpoints.step_of(latest) <= 9  # of the step under way, or of the next; not a regular one
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in latest.iterdir()}
    shutil.copytree(odd.directory / "killed", odd.directory / "other")

    heard: list[Entry | Progress] = []
    again = odd.context("sft", run="killed", sft=section)
    assert in_two(again, heard.append) == finals
    assert odd.curves("killed") == odd.curves("whole")
    assert [event for event in heard if isinstance(event, Entry)] == list(read_journal(journal(again)))
    assert all(torch.equal(a, b) for a, b in zip(weights(again).values(), weights(whole).values(), strict=True))

    alone = odd.context("sft", run="other", sft=section)
    assert_same(whole, alone, [finals, in_one(alone)])


@pytest.mark.slow
def test_a_cancelled_ppo_leaves_a_checkpoint_of_the_same_update_in_both(odd: Any) -> None:
    def cancel(event: Entry | Progress) -> None:
        if isinstance(event, Progress) and event.done == 3:
            raise KeyboardInterrupt

    def context(run: str) -> Context:
        options = PPO | {"rewards": {"brevity": 1.0}, "checkpoint_every": 100, "updates": 40, "eval_every": 0}
        return replace(odd.context("sft", run=run, reward="off", ppo=options), stage="ppo")

    write_prompts(odd)
    with pytest.raises(KeyboardInterrupt):
        in_two(context("cancelled"), cancel)
    latest = checkpoints.latest(odd.directory / "cancelled/checkpoints")
    assert latest is not None
    assert 3 <= checkpoints.step_of(latest) < 40
    again, whole, told = context("cancelled"), context("whole"), list[int]()
    in_two(again, lambda event: told.append(event.done) if isinstance(event, Progress) else None)
    assert told[0] == checkpoints.step_of(latest) + 1
    in_two(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(again).values(), weights(whole).values(), strict=True))


# ------------------------------------------------------------------------------------------------------------ shares
class Order:
    """Rows in their order."""

    def __init__(self, rows: int) -> None:
        self.rows, self.epoch = rows, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Any:
        return iter(range(self.rows))


@pytest.mark.parametrize(("rows", "batch", "micro"), [(85, 28, 4), (85, 28, 14), (84, 12, 6), (5, 8, 1), (7, 3, 2)])
@pytest.mark.parametrize("count", [2, 3])
def test_shares_make_the_batches_of_one_process(rows: int, batch: int, micro: int, count: int) -> None:
    shares = [processes.Shares(Order(rows), batch, micro, index, count) for index in range(count)]
    ours = [list(share) for share in shares]
    assert {len(share) for share in ours} == {len(shares[0])} == {len(share) for share in shares}
    assert all(len(rows) <= micro for share in ours for rows in share)
    assert all(ours[0])  # the first process always has rows, and tells the others' number of micro-batches
    a_step, place = math.ceil(batch / (count * micro)), 0
    for start in range(0, rows, batch):
        expected = set(range(start, min(start + batch, rows)))
        steps = min(a_step, len(ours[0]) - place)
        taken = [row for share in ours for part in share[place : place + steps] for row in part]
        assert (len(taken), set(taken)) == (len(expected), expected)
        place += steps
    shares[0].set_epoch(3)
    assert shares[0]._order.epoch == 3


def test_no_rows_add_nothing(toy: Any) -> None:
    """But there is a graph to every weight, whose gradients the processes exchange."""
    model = loading.load_policy(toy.shared / "prepare/base")
    total, count = sft.response_loss(model, sft.collate([]))
    total.backward()
    assert (total.item(), int(count)) == (0.0, 0)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_the_threads_are_shared_out(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def threads(**changes: Any) -> int:
        return launch._threads(toy.context("sft").config.resources.model_copy(update=changes))

    assert threads(threads=8, processes=4) == 2
    assert threads(threads=2, processes=3) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert threads(threads=0, processes=2) == 3


@pytest.mark.parametrize(("micro", "expected"), [(None, (7, 1)), (4, (4, 2)), (14, (7, 1))])
def test_four_processes_have_a_quarter_each(
    micro: int | None, expected: tuple[int, int], toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "count", lambda: 4)
    context = toy.context("sft", sft={"batch_size": 28, "micro_batch_size": micro})
    args = supervised.training_arguments(RewardConfig, context.config.sft, context)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == expected


@pytest.mark.parametrize("index", [0, 2])
def test_each_process_drops_out_other_activations(index: int, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trainer:
        seed = 0
        model = torch.nn.Linear(1, 1)

        def remove_callback(self, callback: Any) -> None: ...

        def add_callback(self, callback: Any) -> None: ...

        def train(self, resume_from_checkpoint: Any) -> None:
            self.seed = torch.initial_seed()
            self.state = TrainerState(global_step=1, max_steps=1)

    monkeypatch.setattr(processes, "index", lambda: index)
    context, trainer = toy.context("sft"), Trainer()
    computing.seed_everything(context.config.seed)
    supervised.train(trainer, context, None)  # type: ignore[arg-type]
    assert trainer.seed == context.config.seed + index
