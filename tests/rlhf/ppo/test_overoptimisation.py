"""The alarm of a judge: by hand, its threshold, its rate on healthy trainings, and a training that gives rise to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.ppo.overoptimisation import LEVEL, Peak, alarm, alarms, followed, standard_error, threshold
from rlhf.ppo.trainer import Trainer
from rlhf.rewards import FunctionScorer, Rewards

ZIGZAG = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)  # mean 0, standard error sqrt(8 / 7) / sqrt(8) = 0.37796


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_standard_error_of_a_mean() -> None:
    assert standard_error(vector(1.0, 2.0, 3.0, 6.0)) == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2)
    assert standard_error(ZIGZAG) == pytest.approx(0.37796, abs=1e-5)
    assert math.isnan(standard_error(vector(1.0)))


@pytest.mark.parametrize(
    ("evaluations", "prompts", "quantile"),
    [  # of Student's t with prompts - 1 degrees of freedom, at 1 - 0.05 / pairs of evaluations; from SciPy's t.ppf
        (2, 8, 1.895),  # 1 pair
        (4, 8, 3.128),  # 6 pairs
        (4, 16, 2.694),
        (11, 64, 3.256),  # 55 pairs
        (31, 16, 4.843),  # 465 pairs
        (31, 64, 3.928),
        (101, 256, 4.349),
        (201, 8, 12.446),  # 20,100 pairs
    ],
)
def test_the_threshold_is_a_quantile_of_students_t(evaluations: int, prompts: int, quantile: float) -> None:
    assert threshold(evaluations, prompts) == pytest.approx(quantile, abs=5e-4)


def test_few_prompts_raise_no_alarm() -> None:
    assert math.isinf(threshold(4, 7))
    few = Peak(0, [0.0] * 7, [1.0] * 7)
    assert not alarm(torch.ones(7), torch.zeros(7), few, 4)
    assert not alarm(torch.ones(1), torch.zeros(1), Peak(0, [0.0], [1.0]), 4)


def test_the_alarm_by_hand() -> None:
    """Of eight prompts in the second of two evaluations: both means must move by 1.895 * 0.37796 = 0.716."""
    peak = Peak(0, [1.0] * 8, [5.0] * 8)
    up, down = 1.0 + 0.72 + ZIGZAG, 5.0 - 0.72 + ZIGZAG
    assert alarm(up, down, peak, 2)
    assert not alarm(up - 0.01, down, peak, 2)
    assert not alarm(up, down + 0.01, peak, 2)
    assert not alarm(down - 4.0, up + 4.0, peak, 2)  # the other way round
    assert not alarm(up, down, peak, 3)  # three evaluations make three pairs: one must look harder
    assert not alarm(up, down, None, 2)
    assert not alarm(torch.ones(8), torch.full((8,), 5.0), peak, 2)  # nothing has changed at all
    assert alarm(torch.full((8,), 1.1), torch.full((8,), 4.9), peak, 2)  # for every prompt the same


def test_the_differences_are_paired() -> None:
    """Prompts differ by far more than the two evaluations; the order of the prompts must be the peak's."""
    prompts = 100.0 * torch.arange(8, dtype=torch.float64)
    peak = Peak(3, prompts.tolist(), prompts.tolist())
    assert alarm(prompts + 2.0 + ZIGZAG, prompts - 2.0 + ZIGZAG, peak, 2)
    assert not alarm(prompts.flip(0) + 2.0 + ZIGZAG, prompts - 2.0 + ZIGZAG, peak, 2)


def test_the_peak_is_where_the_judge_was_best_first() -> None:
    peaks: dict[str, Peak] = {}
    for update, (proxy, judge) in enumerate([(1.0, 2.0), (2.0, 4.0), (3.0, 4.0), (4.0, 3.0)]):
        peaks = followed(peaks, update, torch.full((8,), proxy), {"a": torch.full((8,), judge), "b": torch.ones(8)})
    assert peaks == {"a": Peak(1, [2.0] * 8, [4.0] * 8), "b": Peak(0, [1.0] * 8, [1.0] * 8)}
    lower = {"a": torch.full((8,), 3.9), "b": torch.ones(8)}
    assert alarms(torch.full((8,), 5.0), lower, peaks, 5) == {"overoptimised/a": 1.0, "overoptimised/b": 0.0}
    assert alarms(torch.full((8,), 2.0), lower, peaks, 5)["overoptimised/a"] == 0.0


@pytest.mark.parametrize("remembered", [0.0, 0.9])
@pytest.mark.parametrize(("evaluations", "prompts"), [(4, 8), (11, 64)])
def test_healthy_trainings_seldom_see_an_alarm(evaluations: int, prompts: int, remembered: float) -> None:
    """The proxy rises all the time, the judge's expected score stays: at most 5 % of trainings, whatever the noise.

    Of 400, 5 % are 20 with a standard deviation of 4.4; more than 33 of them would be three of these beyond.
    """
    generator = torch.Generator().manual_seed(evaluations)
    seen = 0
    for _ in range(400):
        noise, peaks, on = torch.zeros(prompts, dtype=torch.float64), dict[str, Peak](), False
        for update in range(evaluations):
            new = torch.randn(prompts, generator=generator, dtype=torch.float64)
            noise = remembered * noise + math.sqrt(1 - remembered**2) * new
            proxy = update + 0.1 * torch.randn(prompts, generator=generator, dtype=torch.float64)
            on |= alarm(proxy, noise, peaks.get("judge"), evaluations)
            peaks = followed(peaks, update, proxy, {"judge": noise})
        seen += on
    assert seen <= 33


def test_a_fall_that_is_there_is_seen() -> None:
    """By half a standard deviation, with 64 prompts and eleven evaluations: not always, but mostly."""
    generator = torch.Generator().manual_seed(0)
    seen = 0
    for _ in range(200):
        before, after = (torch.randn(64, generator=generator, dtype=torch.float64) * 0.5 for _ in range(2))
        peak = Peak(0, torch.zeros(64).tolist(), before.tolist())
        seen += alarm(torch.ones(64, dtype=torch.float64), after - 0.5, peak, 11)
    assert seen > 180
    assert LEVEL == 0.05


# --------------------------------------------------------------------------------------------------- a real training
def length(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The proxy: the longer the better."""
    return [len(response) / 10 for response in responses]


def enough(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """What was meant: some length, and then no more of it."""
    return [-abs(len(response) - 10.0) for response in responses]


@pytest.mark.slow
@pytest.mark.parametrize(("kl_coef", "expected"), [(0.0, 1.0), (0.3, 0.0)])
def test_too_much_of_a_good_thing_sets_it_off_and_a_kl_penalty_keeps_it_off(
    kl_coef: float, expected: float, make_trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        updates=40, episodes=32, learning_rate=3e-3, kl_coef=kl_coef, eval_every=4, max_new_tokens=16, eval_prompts=64
    )
    assert trainer.held_out is not None
    trainer.rewards = Rewards.of(length)
    trainer.judges = {"enough": FunctionScorer(enough, "enough")}
    trainer.held_out = trainer.held_out.select([row % 6 for row in range(64)])
    finals = trainer.train()
    rows = trainer.progress.evaluations
    assert finals["ppo/overoptimised"] == expected
    assert rows[-1]["score"] > rows[0]["score"]
    told = [record.getMessage() for record in caplog.records if "over-optimised" in record.getMessage()]
    assert len(told) == expected
