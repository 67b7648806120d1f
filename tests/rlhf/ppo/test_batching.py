"""Prompts, random numbers and micro-batches as functions of the seed and the update."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from rlhf.ppo import batching


@pytest.mark.parametrize(("episodes", "count"), [(4, 10), (8, 6), (6, 6), (5, 1), (7, 100)])
def test_every_pass_takes_every_prompt_once(episodes: int, count: int) -> None:
    updates = 5 * count
    rows = [row for update in range(1, updates + 1) for row in batching.prompt_rows(3, update, episodes, count)]
    assert len(rows) == updates * episodes
    passes = [rows[start : start + count] for start in range(0, len(rows), count)]
    assert all(sorted(one) == list(range(count)) for one in passes)
    if count > 5:
        assert len({tuple(one) for one in passes}) > 1  # each in an order of its own


def test_the_order_is_that_of_the_seed() -> None:
    assert batching.prompt_rows(1, 2, 8, 50) == batching.prompt_rows(1, 2, 8, 50)
    assert batching.prompt_rows(1, 2, 8, 50) != batching.prompt_rows(2, 2, 8, 50)


def test_generators_have_a_state_for_each_purpose() -> None:
    draws = {
        torch.rand(1, generator=batching.generator(*key)).item()
        for key in [(0, "sample", 1), (0, "sample", 2), (0, "shuffle", 1), (1, "sample", 1), (2**32 - 1, "sample", 1)]
    }
    assert len(draws) == 5
    one, two = (torch.rand(3, generator=batching.generator(0, "sample", 1)) for _ in range(2))
    assert torch.equal(one, two)


def test_reseed_sets_every_global_generator() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    batching.reseed(5, 7)
    first = draw()
    batching.reseed(5, 8)
    assert all(a != b for a, b in zip(first, draw(), strict=True))
    batching.reseed(5, 7)
    assert draw() == first


def test_micro_batches_fit_the_budget_and_hold_every_row_once() -> None:
    lengths = torch.tensor([5, 3, 9, 9, 2, 30, 4, 4])
    batches = batching.micro_batches(lengths, budget=18)
    assert sorted(torch.cat(batches).tolist()) == list(range(8))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * int(lengths[rows].max()) <= 18
    assert [rows.tolist() for rows in batches] == [[5], [2, 3], [0, 6, 7], [1, 4]]
    assert len(batching.micro_batches(lengths, budget=10**6)) == 1


def test_pad() -> None:
    ids, lengths = batching.pad([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert lengths.tolist() == [3, 1]


def test_prompts_select() -> None:
    prompts = batching.Prompts(["a", "b", "c"], [[1], [2], [3]], {"n": [10, 20, 30]})
    assert prompts.select([2, 0, 2]) == batching.Prompts(["c", "a", "c"], [[3], [1], [3]], {"n": [30, 10, 30]})
