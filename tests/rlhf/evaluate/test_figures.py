"""The figures of an evaluation, worked out again from its samples: comparisons, perplexity, references, judges."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2LMHeadModel

from rlhf import metrics
from rlhf.evaluate import answers, figures
from rlhf.evaluate.figures import Corpus
from rlhf.ppo import rollout
from rlhf.ppo.rollout import Rollout
from rlhf.statistics import intervals
from tests.rlhf.evaluated import PROMPTS, Ran, config, context, make_inputs, pairs_of, prepared

HERE = "tests.rlhf.evaluated"
SURE = (0.95, 50, 3)  # of config()
GIVEN = np.arange(PROMPTS) != 3  # rows with a reference


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def judging(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """With a judge that prefers the longer response, but the first one of two that are equally long."""
    asked = config(judges={"editor": f"{HERE}:longer"}, length_column="words")
    return Ran(context(asked, inputs, tmp_path_factory.mktemp("judging")))


def column(ran: Ran, policy: str, metric: str) -> Any:
    return np.array(ran.samples[f"{policy}_{metric}"], dtype=np.float64)


def same(found: dict[str, Any], expected: Any) -> None:
    """A figure of report.json against an estimate."""
    for name, value in expected._asdict().items():
        assert found[name] == (None if np.isnan(value) else pytest.approx(value)), name


# --- comparisons
def test_who_is_compared_with_whom(judging: Ran) -> None:
    assert pairs_of(judging) == [("ppo", "sft"), ("ppo", "base"), ("ppo", "reference"), ("sft", "base")]
    assert figures.pairs(["base", "sft"]) == [("sft", "base")]
    assert figures.pairs(["base", "reference"]) == [("base", "reference")]
    assert figures.pairs(["base"]) == []


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("score", ["reward", "held_out", "keyword"])
def test_scores_are_compared_as_their_samples_say(judging: Ran, number: int, score: str) -> None:
    one = judging.report["comparisons"][number]
    a, b = (column(judging, one[side], score) for side in ("candidate", "baseline"))
    known = ~np.isnan(a - b)
    found, test = one["scores"][score], intervals.paired_test(a, b, 50, 3)
    assert found["win_rate"]["value"] == pytest.approx(np.mean((a > b)[known] + (a == b)[known] / 2))
    shares = [found[kind] for kind in ("wins", "ties", "losses")]
    assert shares == pytest.approx([np.mean(x[known]) for x in (a > b, a == b, a < b)])
    same(found["difference"], intervals.paired_difference(a, b, *SURE))
    assert (found["p"], found["effect"]) == pytest.approx((test.p, test.effect))
    longer = column(judging, one["candidate"], "length_tokens") - column(judging, one["baseline"], "length_tokens")
    wins = np.where(known, (a > b) + (a == b) / 2, np.nan)
    same(found["win_rate_length_controlled"], intervals.length_controlled_win_rate(wins, longer, *SURE))
    assert found["win_rate"]["n"] == (PROMPTS - 1 if one["baseline"] == "reference" else PROMPTS)


def test_every_other_metric_of_both_is_compared(judging: Ran) -> None:
    first, _, against_references, _ = judging.report["comparisons"]
    alone = {"kl", "eos_rate", "perplexity", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum", "meteor"}
    alone |= {"sentence_bleu", "sentence_chrf"}
    shared = {"length_tokens", "length_words", "length_error", "length_exact", "distinct1", "distinct2", "self_bleu"}
    assert set(first["metrics"]) == alone | shared
    assert set(against_references["metrics"]) == shared
    for name in ("rougeL", "kl", "self_bleu"):
        a, b = column(judging, "ppo", name), column(judging, "sft", name)
        same(first["metrics"][name]["difference"], intervals.paired_difference(a, b, *SURE))


def test_metrics_of_the_corpus_are_compared_on_the_same_resamples(judging: Ran) -> None:
    first = judging.report["comparisons"][0]["metrics"]
    references = [judging.samples["reference"][row] for row in np.flatnonzero(GIVEN)]
    counts = [
        metrics.bleu_statistics([judging.samples[name][row] for row in np.flatnonzero(GIVEN)], references)
        for name in ("ppo", "sft")
    ]
    expected = intervals.paired_corpus_difference(*map(metrics.bleu_statistic, counts), PROMPTS - 1, *SURE)
    same(first["bleu"]["difference"], expected.difference)
    assert first["bleu"]["p"] == pytest.approx(expected.p)
    assert first["bleu"]["effect"] is None
    distinct = [metrics.distinct(judging.samples[name], 2) for name in ("ppo", "sft")]
    same(first["distinct2"]["difference"], intervals.paired_corpus_difference(*distinct, PROMPTS, *SURE).difference)


def test_finals_are_those_of_the_comparisons(judging: Ran) -> None:
    first, base, references, _ = judging.report["comparisons"]
    for score in ("reward", "held_out", "keyword"):
        of = first["scores"][score]
        assert judging.finals[f"evaluate/win_rate/{score}"] == of["win_rate"]["value"]
        assert judging.finals[f"evaluate/difference/{score}_low"] == of["difference"]["low"]
        assert judging.finals[f"evaluate/p_value/{score}"] == of["p"]
        even = of["win_rate_length_controlled"]["value"]
        assert judging.finals[f"evaluate/win_rate_length_controlled/{score}"] == even
        for kind, one in (("base", base), ("references", references)):
            assert (
                judging.finals[f"evaluate/win_rate_against_{kind}/{score}"] == one["scores"][score]["win_rate"]["value"]
            )
    assert judging.finals["evaluate/win_rate/editor"] == first["judges"]["editor"]["win_rate"]["value"]


def test_a_part_of_a_corpus_is_as_a_corpus_of_its_own() -> None:
    texts = ["a b", "b c", "c c c", "d"]
    corpus = Corpus(metrics.distinct(texts, 1), np.ones(4, dtype=bool), (0.0, 1.0))
    counts = np.array([[1, 2, 0], [0, 1, 1]])
    rows = np.array([0, 2, 3])
    own = metrics.distinct([texts[row] for row in rows], 1)
    assert corpus.on(rows)(counts).tolist() == own(counts).tolist()


# --- judges
def test_judges_are_asked_in_both_orders(judging: Ran) -> None:
    for one in judging.report["comparisons"]:
        texts = [judging.samples[one[side]] for side in ("candidate", "baseline")]
        sizes = [(len(a), len(b)) for a, b in zip(*texts, strict=True) if a is not None and b is not None]
        found = one["judges"]["editor"]
        assert found["wins"] == pytest.approx(np.mean([a > b for a, b in sizes]))
        assert found["ties"] == pytest.approx(np.mean([a == b for a, b in sizes]))  # the orders contradict each other
        assert found["consistency"] == pytest.approx(np.mean([a != b for a, b in sizes]))
        assert found["win_rate"]["n"] == len(sizes)
        assert found["shown_first_share"] >= 0.5


# --- metrics
def test_perplexity_is_that_of_a_loop_over_tokens(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[tuple[list[int], list[int]]] = []  # prompt and response of each row, of one policy after the other

    def collect(*arguments: Any) -> Rollout:
        made = rollout.collect(*arguments)
        for prompt, n, response, m in zip(*(tensor.tolist() for tensor in made.sequences), strict=True):
            sampled.append((prompt[:n], response[:m]))
        return made

    monkeypatch.setattr(answers, "collect", collect)
    found = Ran(context(config(), inputs, tmp_path))
    model = GPT2LMHeadModel.from_pretrained(inputs["sft"] / "model").double().eval()  # whoever wrote the text
    for number, policy in enumerate(("base", "sft", "ppo")):
        rows = sampled[number * PROMPTS : (number + 1) * PROMPTS]
        nll = []
        for prompt, response in rows:
            with torch.no_grad():
                logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
            nll.append(-sum(logprobs[place, token].item() for place, token in zip(places, response, strict=True)))
        assert column(found, policy, "nll").tolist() == pytest.approx(nll, rel=1e-5)
        expected = math.exp(sum(nll) / sum(len(response) for _, response in rows))
        assert found.finals[f"evaluate/{policy}/perplexity"] == pytest.approx(expected, rel=1e-5)
        estimate = found.report["metrics"][policy]["perplexity"]
        assert estimate["low"] < estimate["value"] < estimate["high"]


def test_target_lengths(judging: Ran, inputs: dict[str, Path]) -> None:
    targets = pq.read_table(inputs["prepare"] / "prompts" / "test.parquet")["words"].to_pylist()[:PROMPTS]
    for policy in ("base", "ppo"):
        words = [len(text.split()) for text in judging.samples[policy]]
        off = [np.nan if b is None else abs(a - b) for a, b in zip(words, targets, strict=True)]
        assert column(judging, policy, "length_error").tolist() == pytest.approx(off, nan_ok=True)
        exact = judging.report["metrics"][policy]["length_exact"]
        assert exact["value"] == pytest.approx(np.mean([a == b for a, b in zip(words, targets, strict=True) if b]))
        assert exact["n"] == PROMPTS - targets.count(None) < PROMPTS


def test_the_kl_has_its_standard_error(judging: Ran) -> None:
    kl = column(judging, "ppo", "kl")
    assert judging.report["metrics"]["ppo"]["kl"]["stderr"] == pytest.approx(kl.std(ddof=1) / math.sqrt(PROMPTS))
    assert judging.finals["evaluate/ppo/kl_stderr"] == judging.report["metrics"]["ppo"]["kl"]["stderr"]


def test_several_references(inputs: dict[str, Path], tmp_path: Path) -> None:
    prompts = pq.read_table(inputs["prepare"] / "prompts" / "test.parquet")
    first = prompts["reference"].to_pylist()
    several = [[text, f"{text} or the gym is open"] if text and row % 2 else None for row, text in enumerate(first)]
    several[0] = ["", " "]  # as good as none, and so the text in `reference` counts for nothing
    both = prompts.append_column("references", pa.array(several, pa.list_(pa.string())))
    bare = prepared(inputs, tmp_path / "prepare", both)
    found = Ran(context(config(), {**inputs, "prepare": bare}, tmp_path))
    expected = [of or ([text] if text else None) for of, text in zip(several, first, strict=True)][:PROMPTS]
    expected[0] = None
    assert found.samples["reference"] == expected
    rouge = metrics.rouge(found.samples["ppo"], [of or [] for of in expected])["rougeL"]
    assert column(found, "ppo", "rougeL").tolist() == pytest.approx(rouge.tolist(), nan_ok=True)
    assert found.report["metrics"]["ppo"]["rougeL"]["n"] == PROMPTS - 2
    assert found.report["comparisons"][2]["scores"]["reward"]["difference"]["n"] == PROMPTS - 2


# --- what PPO was trained on, and what it left
def test_rewards_of_ppo_are_measured_once(inputs: dict[str, Path], tmp_path: Path) -> None:
    rewards = {"model": 1.0, f"{HERE}:keyword": 0.5, "brevity": 0.1, "keywords": {"arguments": {"words": ["gym"]}}}
    scorers = {"mine": f"{HERE}:keyword", "gym": {"function": "keywords", "arguments": {"words": ["gym"]}}}
    found = Ran(context(config(ppo={"rewards": rewards}, scorers=scorers), inputs, tmp_path))
    assert found.report["judged"] == ["reward", "held_out", "mine", "gym"]
    assert found.report["trained_on"] == ["reward", "mine", "gym"]
    assert {name for name in found.report["metrics"]["ppo"] if name.startswith("reward_")} == {"reward_brevity"}
    assert column(found, "ppo", "reward_brevity").tolist() == [-len(text.split()) for text in found.samples["ppo"]]
    assert "reward_brevity" in found.report["comparisons"][0]["metrics"]


def test_the_held_out_judge_is_not_the_reward(judging: Ran) -> None:
    assert judging.report["judged"] == ["reward", "held_out", "keyword"]
    assert judging.report["trained_on"] == ["reward"]
    assert not np.allclose(column(judging, "ppo", "held_out"), column(judging, "ppo", "reward"))


def test_evaluations_of_ppo_become_curves_over_kl(judging: Ran) -> None:
    assert judging.report["overoptimisation"] == {
        "update": [0, 1, 2],
        "kl": [0.0, 1.0, 4.0],
        "proxy": {"name": "reward", "value": [0.0, 1.0, 2.0], "stderr": [0.1] * 3},
        "judges": {"held_out": {"value": [0.0, 0.5, -1.0], "stderr": [0.2] * 3, "alarm": [0.0, 0.0, 1.0]}},
    }


def test_report_json_names_neither_places_nor_machine(judging: Ran, inputs: dict[str, Path]) -> None:
    text = (judging.out / "report.json").read_text()
    assert str(inputs["sft"].parent) not in text
    assert "tiny" not in text
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
