"""The evaluate stage on a tiny random GPT-2, from prompts in a Parquet file to report and final metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf import evaluate, report
from rlhf.config import PipelineConfig
from rlhf.context import Context
from rlhf.errors import ConfigError, DataError, RewardError
from rlhf.tracker import NullTracker

PROMPTS = 24
WORDS = ["the", "gym", "is", "closed", "on", "monday", "because", "of", "a", "leak", "so", "please", "use", "noon"]
SIZE = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
seen: list[dict[str, Any]] = []


def keyword(prompts: Sequence[str], responses: Sequence[str], word: Sequence[str], **columns: Any) -> list[float]:
    """A scorer that wants a column of the rows."""
    seen.append({"prompts": prompts, "responses": responses, "word": word, **columns})
    return [float(response.count(one)) for response, one in zip(responses, word, strict=True)]


def broken(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
    return [math.nan] * len(prompts)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts of all earlier stages; the policies are random, and PPO's is SFT's with some noise."""
    root = tmp_path_factory.mktemp("inputs")
    corpus = [" ".join(WORDS), " ".join(reversed(WORDS))]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(corpus, vocab_size=300, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>", pad_token="<end>")
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

    torch.manual_seed(0)
    for stage, part in (("prepare", "base"), ("sft", "model")):
        GPT2LMHeadModel(GPT2Config(**SIZE, **ids)).save_pretrained(root / stage / part)
    ppo = GPT2LMHeadModel.from_pretrained(root / "sft" / "model")
    with torch.no_grad():
        for weight in ppo.parameters():
            weight += 0.05 * torch.randn_like(weight)
    ppo.save_pretrained(root / "ppo" / "model")
    reward = GPT2ForSequenceClassification(GPT2Config(**SIZE, **ids, num_labels=1))
    reward.config.score_mean, reward.config.score_std = 0.25, 2.0
    reward.save_pretrained(root / "reward" / "model")
    for model in ("prepare/base", "sft/model", "ppo/model", "reward/model"):
        tokenizer.save_pretrained(root / model)

    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, 6 + row % 5)) for row in range(PROMPTS + 3)]
    table = {
        "prompt": [f"{text} {row}:" for row, text in enumerate(texts)],
        "reference": [None if row == 3 else f" {text}." for row, text in enumerate(texts)],
        "word": [text.split()[0] for text in texts],
    }
    (root / "prepare" / "prompts").mkdir(parents=True)
    pq.write_table(pa.table(table), root / "prepare" / "prompts" / "test.parquet")
    curves = {"step": [1, 2], "score_mean": [0.0, 1.0], "kl": [0.0, 2.0], "entropy": [3.0, 3.0]}
    pq.write_table(pa.table(curves), root / "ppo" / "curves.parquet")
    pairs = {"split": ["test"] * 4 + ["train"], "chosen_score": [2.0, 1, 3, 1, 9], "rejected_score": [1.0, 1, 2, 2, 0]}
    pq.write_table(pa.table(pairs), root / "reward" / "scores.parquet")
    return {stage: root / stage for stage in ("prepare", "sft", "reward", "ppo")}


def config(**settings: Any) -> PipelineConfig:
    sections = {name: settings.pop(name) for name in ("sft", "reward", "ppo") if name in settings}
    evaluate_section = {
        "prompts": PROMPTS, "max_new_tokens": 12, "temperature": 0.7, "bootstrap": 50, "batch_size": 7,
        "scorers": {"keyword": f"{__name__}:keyword"}, **settings,
    }  # fmt: skip
    return PipelineConfig.model_validate(
        {
            "name": "tiny",
            "seed": 3,
            "data": {"demonstrations": "d.jsonl", "preferences": "p.jsonl"},
            "model": {"init": "random", "layers": 1, "width": 16, "heads": 2, "context": 64, "vocab_size": 300},
            "evaluate": evaluate_section,
            "resources": {"device": "cpu", "threads": 1},
            **sections,
        }
    )


def context(made: PipelineConfig, inputs: dict[str, Path], root: Path) -> Context:
    out = root / "out"
    out.mkdir()
    return Context("evaluate", made, inputs, out, root / "checkpoints", NullTracker())


class Ran:
    """What one run of the stage gave. Drawing takes most of its time, so only some draw."""

    def __init__(self, made: Context, draw: bool = False) -> None:
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            if not draw:
                patch.setattr(report, "_draw", lambda *args: None)
            self.finals = evaluate.run(made)
        self.out = made.out
        self.report = json.loads((made.out / "report.json").read_text())
        self.samples = pq.read_table(made.out / "samples.parquet").to_pydict()


@pytest.fixture(scope="module")
def ran(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(context(config(), inputs, tmp_path_factory.mktemp("run")), draw=True)


def test_every_figure_of_every_policy_is_there(ran: Ran) -> None:
    per_policy = {
        "kl", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "sentence_bleu", "meteor", "reward", "keyword",
        "length_tokens", "length_words", "eos_rate", "distinct1", "distinct2",
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


def test_win_rate_and_difference_are_those_of_the_samples(ran: Ran) -> None:
    for score in ("reward", "keyword"):
        ppo, sft = (np.array(ran.samples[f"{name}_{score}"]) for name in ("ppo", "sft"))
        assert ran.finals[f"evaluate/win_rate/{score}"] == pytest.approx(np.mean((ppo > sft) + (ppo == sft) / 2))
        assert ran.finals[f"evaluate/difference/{score}"] == pytest.approx(np.mean(ppo - sft))
    assert {"evaluate/win_rate/reward_low", "evaluate/win_rate/keyword_high"} <= set(ran.finals)
    assert (ran.report["comparison"]["candidate"], ran.report["comparison"]["baseline"]) == ("ppo", "sft")


def test_the_last_policy_is_compared_with_the_references(ran: Ran) -> None:
    ppo, given = (np.array(ran.samples[f"{name}_reward"])[np.arange(PROMPTS) != 3] for name in ("ppo", "reference"))
    name = "evaluate/win_rate_against_references/reward"
    assert ran.finals[name] == pytest.approx(np.mean((ppo > given) + (ppo == given) / 2))
    assert ran.finals[f"{name}_low"] <= ran.finals[name] <= ran.finals[f"{name}_high"]
    assert ran.report["against_references"]["candidate"] == "ppo"
    assert ran.report["against_references"]["win_rates"]["reward"]["n"] == PROMPTS - 1


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
    assert set(ran.report["models"]) == {"base", "sft", "ppo", "reward"}


def test_the_name_of_the_pipeline_changes_no_byte(ran: Ran, inputs: dict[str, Path], tmp_path: Path) -> None:
    other = Ran(context(config().model_copy(update={"name": "renamed"}), inputs, tmp_path))
    assert other.report == ran.report
    assert "renamed" not in (other.out / "report.html").read_text()


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
    assert {str(path) for path in files} >= {"report.html", "report.json", "samples.parquet", "plots/ppo_curves.png"}
    for path in files:
        assert (ran.out / path).read_bytes() == (again.out / path).read_bytes(), path


def test_batch_size_changes_no_response_and_the_seed_does(ran: Ran, inputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    other = Ran(context(config(batch_size=PROMPTS), inputs, tmp_path / "one"))
    for name in ("base", "sft", "ppo"):
        assert other.samples[name] == ran.samples[name]
        assert other.samples[f"{name}_kl"] == pytest.approx(ran.samples[f"{name}_kl"], abs=1e-4)
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
    assert (found.report["comparison"]["candidate"], found.report["comparison"]["baseline"]) == ("sft", "base")
    assert set(found.report["comparison"]["win_rates"]) == {"keyword"}
    assert "ppo" not in found.samples
    assert found.report["curves"] is None
    assert not (found.out / "plots" / "ppo_curves.png").exists()


def test_without_sft_the_base_is_the_reference_policy(inputs: dict[str, Path], tmp_path: Path) -> None:
    fewer = {stage: inputs[stage] for stage in ("prepare", "ppo")}
    off = config(sft=False, reward=False, ppo={"rewards": {"a:b": 1.0}}, scorers={})
    found = Ran(context(off, fewer, tmp_path), draw=True)
    assert found.report["kl_reference"] == "base"
    assert set(found.samples["base_kl"]) == {0.0}
    assert min(found.samples["ppo_kl"]) > 0
    assert found.report["comparison"]["win_rates"] == {}
    assert not (found.out / "plots" / "scores_boxplot.png").exists()
    assert "neither a reward model nor a scorer" in (found.out / "report.html").read_text()


def test_prompts_without_references_are_scored_without_them(inputs: dict[str, Path], tmp_path: Path) -> None:
    prompts = pq.read_table(inputs["prepare"] / "prompts" / "test.parquet").drop_columns(["reference"])
    bare = tmp_path / "prepare"
    (bare / "prompts").mkdir(parents=True)
    pq.write_table(prompts, bare / "prompts" / "test.parquet")
    (bare / "base").symlink_to(inputs["prepare"] / "base")
    found = Ran(context(config(), {**inputs, "prepare": bare}, tmp_path))
    assert "reference" not in found.report["metrics"]
    assert found.report["against_references"] is None
    assert not any("rouge" in name or "bleu" in name for name in found.finals)
    assert "evaluate/ppo/reward" in found.finals


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"scorers": {"bad": f"{__name__}:broken"}}, RewardError, "broken' returned nan"),
        ({"scorers": {"bad": f"{__name__}:absent"}}, ConfigError, "has no function 'absent'"),
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
