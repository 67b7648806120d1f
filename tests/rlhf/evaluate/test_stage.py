"""The evaluate stage on a tiny random GPT-2, from prompts in a Parquet file to report and final metrics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf.errors import ConfigError, DataError, RewardError
from rlhf.evaluate import stage as evaluate
from tests.rlhf.evaluated import PROMPTS, Ran, config, context, make_inputs, pairs_of, prepared, seen

HERE = "tests.rlhf.evaluated"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def ran(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(context(config(), inputs, tmp_path_factory.mktemp("run")), draw=True)


def test_every_figure_of_every_policy_is_there(ran: Ran) -> None:
    per_policy = {
        "kl", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "sentence_bleu", "meteor", "reward", "keyword",
        "length_tokens", "length_words", "eos_rate", "distinct1", "distinct2", "self_bleu", "perplexity", "chrf",
        "sentence_chrf", "held_out", "kl_stderr",
    }  # fmt: skip
    for policy in ("base", "sft", "ppo"):
        assert {name.split("/")[2] for name in ran.finals if name.startswith(f"evaluate/{policy}/")} >= per_policy
        for metric in ("kl", "reward", "keyword", "rougeL", "length_tokens"):
            name = f"evaluate/{policy}/{metric}"
            assert ran.finals[f"{name}_low"] <= ran.finals[name] <= ran.finals[f"{name}_high"]
    given = {name.split("/")[2] for name in ran.finals if name.startswith("evaluate/reference/")}
    assert given >= {"reward", "keyword", "length_tokens", "length_words", "distinct1", "distinct2"}
    assert not given & {"kl", "rougeL", "bleu", "eos_rate"}
    assert all(isinstance(value, float) and math.isfinite(value) for value in ran.finals.values())


def test_kl_of_sft_to_itself_is_zero_and_of_others_is_not(ran: Ran) -> None:
    assert set(ran.samples["sft_kl"]) == {0.0}
    assert ran.finals["evaluate/sft/kl_high"] == 0.0
    assert min(ran.samples["ppo_kl"]) > 0
    assert min(ran.samples["base_kl"]) > 0


def test_scores_of_the_training_set_stand_beside_those_of_the_policies(ran: Ran) -> None:
    found = ran.report["distributions"]["reward"]
    assert sum(found["counts"]["training"]) == 2
    assert found["means"]["training"] == ran.finals["evaluate/training/reward"] == 4.5
    assert found["means"]["ppo"] == pytest.approx(ran.finals["evaluate/ppo/reward"])
    assert "training" not in ran.report["distributions"]["keyword"]["counts"]
    assert "training" not in ran.report["metrics"]


def test_sizes_of_the_models(ran: Ran, inputs: dict[str, Path]) -> None:
    model = GPT2ForSequenceClassification.from_pretrained(inputs["reward"] / "model")
    assert ran.finals["evaluate/parameters/reward"] == model.num_parameters()
    assert ran.finals["evaluate/size_mb/reward"] == pytest.approx(4e-6 * model.num_parameters())
    assert set(ran.report["models"]) == {"base", "sft", "ppo", "reward", "held_out"}


def test_the_name_of_the_pipeline_changes_no_byte(ran: Ran, inputs: dict[str, Path], tmp_path: Path) -> None:
    other = Ran(context(config().model_copy(update={"name": "renamed"}), inputs, tmp_path))
    assert other.finals == ran.finals
    for name in ("report.json", "samples.parquet"):
        assert (other.out / name).read_bytes() == (ran.out / name).read_bytes()


def test_accuracy_on_preference_pairs_is_over_the_held_out_ones(ran: Ran) -> None:
    assert ran.report["pairs"]["n"] == 4
    assert ran.report["pairs"]["accuracy"]["value"] == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert sum(ran.report["pairs"]["scores"]["counts"]["chosen"]) == 4


def test_samples_hold_the_first_prompts_in_order_with_texts_and_scores(ran: Ran, inputs: dict[str, Path]) -> None:
    table = pq.read_table(inputs["prepare"] / "prompts" / "test.parquet").to_pydict()
    assert ran.samples["prompt"] == table["prompt"][:PROMPTS]
    assert ran.samples["reference"] == table["reference"][:PROMPTS]
    assert len(set(ran.samples["ppo"])) > PROMPTS / 2
    assert not any("<end>" in text for name in ("base", "sft", "ppo") for text in ran.samples[name])
    assert all(1 <= length <= 12 for length in ran.samples["ppo_length_tokens"])
    short = [length < 12 for length in ran.samples["base_length_tokens"]]
    assert all(ended for ended, less in zip(ran.samples["base_eos_rate"], short, strict=True) if less)


def test_a_row_without_reference_is_left_out_of_what_needs_one(ran: Ran) -> None:
    assert math.isnan(ran.samples["ppo_rougeL"][3])
    assert math.isnan(ran.samples["reference_reward"][3])
    assert not math.isnan(ran.samples["ppo_reward"][3])
    estimates = ran.report["metrics"]
    assert estimates["ppo"]["rougeL"]["n"] == estimates["ppo"]["bleu"]["n"] == PROMPTS - 1
    assert estimates["reference"]["reward"]["n"] == estimates["reference"]["distinct1"]["n"] == PROMPTS - 1
    assert estimates["ppo"]["reward"]["n"] == PROMPTS


def test_scorers_get_the_columns_of_their_rows(inputs: dict[str, Path], tmp_path: Path) -> None:
    found = Ran(context(config(), inputs, tmp_path))
    calls = list(seen)
    table = pq.read_table(inputs["prepare"] / "prompts" / "test.parquet").to_pydict()
    known = [row for row in range(PROMPTS) if row != 3]
    assert [len(call["prompts"]) for call in calls] == [PROMPTS] * 3 + [PROMPTS - 1]
    assert calls[0]["word"] == table["word"][:PROMPTS]
    assert calls[0]["reference"] == table["reference"][:PROMPTS]
    assert calls[3]["word"] == [table["word"][row] for row in known]
    assert calls[3]["responses"] == [table["reference"][row] for row in known]
    assert all("prompt" not in call for call in calls)
    assert found.samples["ppo_keyword"] == [
        text.count(word) for text, word in zip(found.samples["ppo"], table["word"][:PROMPTS], strict=True)
    ]


def test_reward_is_the_normalised_logit_of_the_text(ran: Ran, inputs: dict[str, Path]) -> None:
    path = inputs["reward"] / "model"
    model = GPT2ForSequenceClassification.from_pretrained(path)
    model.config.pad_token_id = None  # else its own forward would take the end-of-sequence token for padding
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    for row in (0, 5):
        text = ran.samples["prompt"][row] + ran.samples["ppo"][row] + "<end>"
        with torch.no_grad():
            logit = model(torch.tensor([tokenizer(text)["input_ids"]])).logits.item()
        assert ran.samples["ppo_reward"][row] == pytest.approx((logit - 0.25) / 2, abs=1e-5)


def test_two_runs_give_the_same_bytes(ran: Ran, inputs: dict[str, Path], tmp_path: Path) -> None:
    again = Ran(context(config(), inputs, tmp_path), draw=True)
    assert again.finals == ran.finals
    files = {path.relative_to(ran.out) for path in ran.out.rglob("*") if path.is_file()}
    assert {str(path) for path in files} >= {"report.json", "samples.parquet", "plots/ppo_curves.png"}
    for path in files:
        assert (ran.out / path).read_bytes() == (again.out / path).read_bytes(), path


def test_batch_size_changes_no_response_and_the_seed_does(ran: Ran, inputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    other = Ran(context(config(batch_size=PROMPTS), inputs, tmp_path / "one"))
    for name in ("base", "sft", "ppo"):
        assert other.samples[name] == ran.samples[name]
        for sums in ("kl", "nll"):
            assert other.samples[f"{name}_{sums}"] == pytest.approx(ran.samples[f"{name}_{sums}"], rel=1e-5, abs=1e-4)
    seeded = config().model_copy(update={"seed": 4})
    (tmp_path / "two").mkdir()
    assert Ran(context(seeded, inputs, tmp_path / "two")).samples["ppo"] != ran.samples["ppo"]


def test_greedy_takes_the_likeliest_token_whatever_the_seed(inputs: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        settings = config(temperature=0.0).model_copy(update={"seed": seed})
        found.append(Ran(context(settings, inputs, tmp_path / str(seed))))
    assert found[0].samples["ppo"] == found[1].samples["ppo"]
    assert found[0].report["settings"]["kl_temperature"] == 1.0
    path = inputs["ppo"] / "model"
    model, tokenizer = GPT2LMHeadModel.from_pretrained(path), PreTrainedTokenizerFast.from_pretrained(path)
    for row in (0, 7):
        ids = torch.tensor([tokenizer(found[0].samples["prompt"][row])["input_ids"]])
        start = ids.shape[1]
        with torch.no_grad():
            for _ in range(12):
                token = model(ids).logits[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat([ids, token], dim=1)
                if token.item() == 0:
                    break
        assert found[0].samples["ppo"][row] == tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_without_ppo_sft_is_compared_with_the_base(inputs: dict[str, Path], tmp_path: Path) -> None:
    fewer = {stage: inputs[stage] for stage in ("prepare", "sft")}
    found = Ran(context(config(ppo=False, reward=False), fewer, tmp_path), draw=True)
    assert pairs_of(found) == [("sft", "base"), ("sft", "reference")]
    assert set(found.report["comparisons"][0]["scores"]) == {"keyword"}
    assert found.report["trained_on"] == []
    assert "evaluate/win_rate_against_base/keyword" in found.finals
    assert "ppo" not in found.samples
    assert found.report["curves"] is found.report["overoptimisation"] is None
    assert not (found.out / "plots" / "ppo_curves.png").exists()


def test_without_sft_the_base_is_the_reference_policy(inputs: dict[str, Path], tmp_path: Path) -> None:
    fewer = {stage: inputs[stage] for stage in ("prepare", "ppo")}
    off = config(sft=False, reward=False, ppo={"rewards": {f"{HERE}:keyword": 1.0}}, scorers={})
    found = Ran(context(off, fewer, tmp_path), draw=True)
    assert found.report["kl_reference"] == "base"
    assert set(found.samples["base_kl"]) == {0.0}
    assert min(found.samples["ppo_kl"]) > 0
    assert pairs_of(found) == [("ppo", "base"), ("ppo", "reference")]
    assert found.report["judged"] == found.report["trained_on"] == []
    assert found.report["comparisons"][0]["scores"] == {}
    assert "reward_keyword" in found.report["metrics"]["ppo"]
    assert not (found.out / "plots" / "scores_boxplot.png").exists()


def test_a_base_model_alone_is_compared_with_the_references(inputs: dict[str, Path], tmp_path: Path) -> None:
    off = config(sft=False, reward=False, ppo=False)
    found = Ran(context(off, {"prepare": inputs["prepare"]}, tmp_path))
    assert pairs_of(found) == [("base", "reference")]
    assert "evaluate/win_rate_against_references/keyword" in found.finals
    assert not any(name.startswith("evaluate/win_rate/") for name in found.finals)


def test_prompts_without_references_are_scored_without_them(inputs: dict[str, Path], tmp_path: Path) -> None:
    prompts = pq.read_table(inputs["prepare"] / "prompts" / "test.parquet").drop_columns(["reference"])
    bare = prepared(inputs, tmp_path / "prepare", prompts)
    found = Ran(context(config(), {**inputs, "prepare": bare}, tmp_path))
    assert "reference" not in found.report["metrics"]
    assert ("ppo", "reference") not in pairs_of(found)
    assert found.samples["reference"] == [None] * PROMPTS
    assert not any(
        part in name for part in ("rouge", "bleu", "chrf", "meteor") for name in found.finals if "self" not in name
    )
    assert {"evaluate/ppo/reward", "evaluate/ppo/self_bleu", "evaluate/ppo/perplexity"} <= set(found.finals)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"scorers": {"bad": f"{HERE}:broken"}}, RewardError, "broken' returned nan"),
        ({"scorers": {"bad": f"{HERE}:absent"}}, ConfigError, "has no function 'absent'"),
        ({"judges": {"editor": f"{HERE}:absent"}}, ConfigError, "has no function 'absent'"),
        (
            {"judges": {"editor": f"{HERE}:undecided"}},
            RewardError,
            "evaluate.judges.editor '.*undecided' returned nan",
        ),
        (
            {"judges": {"editor": f"{HERE}:raises"}},
            RewardError,
            "evaluate.judges.editor '.*raises' raised KeyError",
        ),
        ({"length_column": "wrod"}, ConfigError, "'wrod', but the prompts have no such column.*did you mean 'word'"),
        ({"length_column": "word"}, DataError, "held-out prompt 1 has '[a-z]+' there; must be a number of words"),
        ({"max_new_tokens": 60}, DataError, "evaluate.max_new_tokens 60 do not fit into the model's context of 64"),
    ],
)
def test_what_cannot_work_is_refused(
    settings: dict[str, Any], error: type[Exception], message: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        evaluate.run(context(config(**settings), inputs, tmp_path))


def test_no_held_out_prompt_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    empty = pq.read_table(inputs["prepare"] / "prompts" / "test.parquet").slice(0, 0)
    pq.write_table(empty, tmp_path / "prompts" / "test.parquet")
    with pytest.raises(DataError, match="there is no held-out prompt"):
        evaluate.run(context(config(), {**inputs, "prepare": tmp_path}, tmp_path))
