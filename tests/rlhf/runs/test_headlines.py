"""The figures that a person sees first."""

from __future__ import annotations

import pytest

from rlhf.runs import headlines
from rlhf.store import disk

METRICS = {
    "evaluate/sft/words": -0.2, "evaluate/sft/words_low": -0.26, "evaluate/sft/words_high": -0.14,
    "evaluate/ppo/words": 0.77, "evaluate/ppo/words_low": 0.75, "evaluate/ppo/words_high": 0.79,
    "evaluate/ppo/kl": 12.8, "evaluate/ppo/kl_stderr": 0.3, "evaluate/sft/kl": 0.0, "evaluate/ppo/distinct2": 0.9,
    "evaluate/ppo/reward_brevity": 0.5,
    "evaluate/win_rate/words": 0.865, "evaluate/win_rate/words_low": 0.84, "evaluate/win_rate/words_high": 0.89,
    "reward/test_accuracy": 0.9,
}  # fmt: skip


def test_scorers_come_first_and_bounds_are_no_metrics() -> None:
    head, rows = headlines.figures(METRICS)
    assert head == ("held-out prompts", "sft", "ppo")
    assert rows == [
        ("words score", "-0.200 [-0.26, -0.14]", "0.770 [0.75, 0.79]"),
        ("KL to SFT (nats)", "0.000", "12.8"),
    ]


def test_the_held_out_judge_stands_before_the_reward() -> None:
    judged = {"evaluate/ppo/reward": 1.0, "evaluate/ppo/held_out": 0.5, "evaluate/ppo/perplexity": 7.25}
    names = [row[0] for row in headlines.figures(METRICS | judged).rows]
    assert names == ["words score", "held-out reward", "reward", "perplexity", "KL to SFT (nats)"]


def test_a_run_without_evaluation_has_no_rows() -> None:
    assert headlines.figures({"reward/test_accuracy": 0.9}).rows == []
    assert headlines.sentences({}) == []


def test_sentences() -> None:
    assert headlines.sentences(METRICS) == [
        "Reward model: 0.900 of held-out pairs ordered rightly",
        "PPO against SFT by words: surely better, win rate 0.865 [0.84, 0.89]",
    ]


@pytest.mark.parametrize(
    ("difference", "p", "words"),
    [
        (0.4, 0.001, "surely better"),
        (-0.4, 0.001, "surely worse"),
        (0.4, 0.06, "no clear difference"),
        (-0.4, 1.0, "no clear difference"),
    ],
)
def test_the_paired_test_decides_in_words(difference: float, p: float, words: str) -> None:
    found = {
        "evaluate/difference/held_out": difference, "evaluate/p_value/held_out": p, "evaluate/win_rate/held_out": 0.6,
        "evaluate/win_rate_length_controlled/held_out": 0.57, "evaluate/ppo/kl": 1.0, "evaluate/sft/kl": 0.0,
    }  # fmt: skip
    assert headlines.sentences(found) == [
        f"PPO against SFT by held-out reward: {words}, win rate 0.600, 0.57 at equal length"
    ]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.51, 0.7, "surely better"), (0.2, 0.49, "surely worse"), (0.4, 0.6, "no clear difference")],
)
def test_a_judge_without_scores_decides_by_its_interval(low: float, high: float, words: str) -> None:
    key = "evaluate/win_rate/editor"
    found = {"evaluate/ppo/kl": 1.0, "evaluate/sft/kl": 0.0, key: 0.5, f"{key}_low": low, f"{key}_high": high}
    assert headlines.sentences(found)[0].startswith(f"PPO against SFT by editor: {words}, win rate 0.500")


def test_the_reward_comes_last_and_the_held_out_one_first() -> None:
    found = METRICS | {
        "evaluate/win_rate/reward": 0.9,
        "evaluate/win_rate/held_out": 0.8,
        "evaluate/win_rate/zeal": 0.5,
    }
    found["reward/held_out/test_accuracy"] = 0.85
    lines = headlines.sentences(found)
    assert lines[1] == "Held-out reward model: 0.850 of held-out pairs ordered rightly"
    assert [line.split(":")[0].split(" by ")[1] for line in lines[2:]] == ["held-out reward", "words", "zeal", "reward"]


def test_over_optimisation_is_a_warning() -> None:
    alarms = {"ppo/overoptimised": 1.0, "ppo/overoptimised/held_out": 1.0, "ppo/overoptimised/gold": 1.0}
    last = headlines.sentences(METRICS | alarms)[-1]
    assert last.startswith("Over-optimised: the reward of PPO rose while gold and held-out reward fell; see the report")
    assert headlines.sentences(METRICS | dict.fromkeys(alarms, 0.0)) == headlines.sentences(METRICS)


def test_the_names_are_those_of_the_policies_that_were_there() -> None:
    without_sft = {name.replace("/sft/", "/base/"): value for name, value in METRICS.items()}
    assert headlines.figures(without_sft).rows[-1][0] == "KL to BASE (nats)"
    assert headlines.sentences(without_sft)[1].startswith("PPO against BASE by words: surely better, win rate 0.865")
    without_ppo = {name.replace("/sft/", "/base/").replace("/ppo/", "/sft/"): value for name, value in METRICS.items()}
    assert headlines.figures(without_ppo).rows[-1][0] == "KL to SFT (nats)"
    assert headlines.sentences(without_ppo)[1].startswith("SFT against BASE by words: surely better, win rate 0.865")


def test_the_references_are_the_other_side_of_a_comparison_too() -> None:
    rates = {"evaluate/win_rate_against_references/words": 0.61, "evaluate/reference/words": 0.1}
    assert headlines.sentences(METRICS | rates)[2:] == ["PPO against the references by words: win rate 0.610"]


def test_durations_and_sizes() -> None:
    assert [headlines.duration(seconds) for seconds in (0.04, 59.94, 65, 3725)] == [
        "0.0 s", "59.9 s", "1 m 05 s", "62 m 05 s",
    ]  # fmt: skip
    assert [disk.size(count) for count in (999, 1500, 999_949, 999_950, 2_000_000, 3 * 10**12)] == [
        "999 B",
        "1.5 kB",
        "999.9 kB",
        "1.0 MB",
        "2.0 MB",
        "3.0 TB",
    ]
