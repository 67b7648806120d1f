"""The figures that a person sees first."""

from __future__ import annotations

from rlhf import headlines

METRICS = {
    "evaluate/sft/words": -0.2, "evaluate/sft/words_low": -0.26, "evaluate/sft/words_high": -0.14,
    "evaluate/ppo/words": 0.77, "evaluate/ppo/words_low": 0.75, "evaluate/ppo/words_high": 0.79,
    "evaluate/ppo/kl": 12.8, "evaluate/sft/kl": 0.0, "evaluate/ppo/distinct2": 0.9,
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


def test_a_run_without_evaluation_has_no_rows() -> None:
    assert headlines.figures({"reward/test_accuracy": 0.9}).rows == []


def test_sentences() -> None:
    assert headlines.sentences(METRICS) == [
        "Reward model: 0.900 of held-out pairs ordered rightly",
        "PPO against SFT, win rate by words: 0.865 [0.84, 0.89]",
    ]


def test_the_names_are_those_of_the_policies_that_were_there() -> None:
    without_sft = {name.replace("/sft/", "/base/"): value for name, value in METRICS.items()}
    assert headlines.figures(without_sft).rows[-1][0] == "KL to BASE (nats)"
    assert headlines.sentences(without_sft)[1].startswith("PPO against BASE, win rate by words: 0.865")
    without_ppo = {name.replace("/sft/", "/base/").replace("/ppo/", "/sft/"): value for name, value in METRICS.items()}
    assert headlines.figures(without_ppo).rows[-1][0] == "KL to SFT (nats)"
    assert headlines.sentences(without_ppo)[1].startswith("SFT against BASE, win rate by words: 0.865")


def test_the_references_are_the_other_side_of_a_comparison_too() -> None:
    rates = {"evaluate/win_rate_against_references/words": 0.61, "evaluate/reference/words": 0.1}
    assert headlines.sentences(METRICS | rates)[1:] == [
        "PPO against SFT, win rate by words: 0.865 [0.84, 0.89]",
        "PPO against the references, win rate by words: 0.610",
    ]


def test_durations_and_sizes() -> None:
    assert [headlines.duration(seconds) for seconds in (0.04, 59.94, 65, 3725)] == [
        "0.0 s", "59.9 s", "1 m 05 s", "62 m 05 s",
    ]  # fmt: skip
    assert [headlines.size(count) for count in (999, 1500, 2_000_000, 3 * 10**12)] == [
        "999 B",
        "1.5 kB",
        "2.0 MB",
        "3.0 TB",
    ]
