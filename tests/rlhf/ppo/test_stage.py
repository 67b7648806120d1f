"""The stage on a toy pipeline's inputs: what it writes and refuses, and that a kill changes nothing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from rlhf.config.pipeline import PipelineConfig
from rlhf.context import Context
from rlhf.errors import ConfigError, DataError, ModelError
from rlhf.models import loading
from rlhf.ppo import stage
from rlhf.prepare.random_weights import random_model
from rlhf.tracking.tracker import NullTracker

REWARD = "def length(prompts, responses, reference):\n    return [float(len(r)) for r in responses]\n"
SMALL: dict[str, Any] = {"updates": 3, "episodes": 8, "epochs": 2, "max_new_tokens": 8, "learning_rate": 1e-3}
SMALL |= {"checkpoint_every": 1, "log_samples_every": 2}


class Killer(NullTracker):
    """Ends the attempt when an update has been logged."""

    def __init__(self, update: int) -> None:
        self.update = update

    def progress(self, done: int, total: int, **live: float) -> None:
        if done == self.update:
            raise KeyboardInterrupt


@pytest.fixture
def make(toy: Any, tmp_path: Path) -> Callable[..., Context]:
    """A function that makes a context of the ppo stage; ``run`` names what survives a kill."""
    torch.set_num_threads(1)
    shared = tmp_path / "inputs"
    prompts = shared / "prepare/prompts/train.parquet"
    prompts.parent.mkdir(parents=True)
    rows = [{"prompt": f"{a} {b}\n", "reference": a} for a in ("ant", "bee", "cat") for b in ("dog", "eel")]
    pq.write_table(pa.Table.from_pylist(rows), prompts)
    pq.write_table(pa.Table.from_pylist(rows[::-1]), prompts.with_name("validation.parquet"))
    torch.manual_seed(1)
    reward = loading.reward_from_policy(toy.shared / "sft/model")
    reward.config.score_mean, reward.config.score_std = 0.25, 1.5
    loading.save(reward, loading.load_tokenizer(toy.shared / "sft/model"), shared / "reward/model")
    (tmp_path / "my_rewards.py").write_text(REWARD)

    def context(run: str = "run", tracker: Any = None, off: tuple[str, ...] = (), **sections: Any) -> Context:
        base: dict[str, Any] = {
            "seed": 3,
            "data": {"demonstrations": "x.jsonl", "preferences": "x.jsonl"},
            "model": {"init": "random", "layers": 2, "width": 16, "heads": 2, "context": 48, "vocab_size": 270},
            "resources": {"device": "cpu", "threads": 1},
            "ppo": SMALL,
            "evaluate": {"max_new_tokens": 8},
        }
        for name, values in sections.items():
            base[name] = {**base.get(name, {}), **values} if isinstance(values, Mapping) else values
        base |= dict.fromkeys(off, "off")
        inputs = {"prepare": shared / "prepare", "sft": toy.shared / "sft", "reward": shared / "reward"}
        out = tmp_path / run / f"out{sum(1 for _ in (tmp_path / run).glob('out*'))}"
        out.mkdir(parents=True)
        return Context(
            "ppo",
            PipelineConfig.model_validate(base),
            {name: path for name, path in inputs.items() if name not in off},
            out,
            tmp_path / run / "checkpoints",
            tracker or NullTracker(),
        )

    return context


@pytest.mark.parametrize("rank", [0, 2])
def test_what_the_stage_writes(rank: int, make: Callable[..., Context], tmp_path: Path, toy: Any) -> None:
    functions = {"model": 1.0, f"{tmp_path / 'my_rewards.py'}:length": 0.01}
    context = make(ppo={"rewards": functions, "learning_rate": 1e-2}, model={"lora_rank": rank})
    finals = stage.run(context)
    assert finals["ppo/episodes"] == 24
    assert {"ppo/final_reward_mean", "ppo/final_kl", "ppo/final_score_mean"} <= finals.keys()

    policy = loading.load_policy(context.out / "model")
    value = loading.load_reward_model(context.out / "value_model")
    assert value.config.score_mean == 0.25  # from the reward model
    before = loading.load_policy(toy.shared / "sft/model").state_dict()
    assert policy.state_dict().keys() == before.keys()
    assert any(not torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())
    tokenizer = loading.load_tokenizer(context.out / "model")
    assert tokenizer.get_vocab() == loading.load_tokenizer(toy.shared / "sft/model").get_vocab()
    written = {path.name for path in context.out.rglob("*") if path.is_file()}
    shared = {"state", "adapter"} if rank else {"state"}
    assert shared <= {path.name for path in context.out.iterdir()}
    state = {path.name for path in (context.out / "state").iterdir()}
    assert state == {"policy.safetensors", "value_model.safetensors", "optimizer.safetensors", "controllers.json"}
    written -= state | ({"adapter_config.json", "adapter_model.safetensors"} if rank else set())
    assert written == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("samples.parquet", "curves.parquet"),
    }
    curves = pq.read_table(context.out / "curves.parquet").to_pydict()
    assert curves["step"] == [1, 2, 3]
    assert curves["reward_mean"][-1] == finals["ppo/final_reward_mean"]  # a tenth of three updates is the last one
    samples = pq.read_table(context.out / "samples.parquet").to_pydict()
    assert samples.keys() == {"update", "prompt", "response", "score"}
    assert samples["update"] == [2] * 8 + [3] * 8


def test_the_adapter_over_the_sft_policy_is_the_merged_model(make: Callable[..., Context], toy: Any) -> None:
    context = make(model={"lora_rank": 2}, ppo={"learning_rate": 1e-2})
    stage.run(context)
    base = AutoModelForCausalLM.from_pretrained(toy.shared / "sft/model")
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a property under its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = PeftModel.from_pretrained(base, context.out / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(context.out / "model").eval()
    ids = torch.arange(12)[None]
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(loading.load_policy(toy.shared / "sft/model")(ids).logits, merged(ids).logits, atol=1e-3)
    assert str(toy.shared) not in (context.out / "adapter" / "adapter_config.json").read_text()


def test_a_shared_value_head_is_saved(make: Callable[..., Context]) -> None:
    context = make(ppo={"value_model": "shared"})
    stage.run(context)
    head = load_file(context.out / "value" / "head.safetensors")
    assert {name: tuple(weight.shape) for name, weight in head.items()} == {"weight": (1, 16), "bias": (1,)}
    assert head["weight"].any()
    assert not (context.out / "value_model").exists()
    loading.load_policy(context.out / "model")  # an ordinary model: the head is not in it


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("value", ["separate", "shared"])
def test_an_encoder_decoder(value: str, rank: int, make: Callable[..., Context], toy: Any, tmp_path: Path) -> None:
    tokenizer = loading.load_tokenizer(toy.shared / "sft/model")
    shape = {"vocab_size": len(tokenizer), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    t5 = T5ForConditionalGeneration(T5Config(**shape, **ends, decoder_start_token_id=tokenizer.pad_token_id))
    loading.save(t5, tokenizer, tmp_path / "t5")
    context = make(
        off=("sft", "reward", "judge"),
        model={"init": "pretrained", "path": str(tmp_path / "t5"), "lora_rank": rank},
        ppo={"rewards": {f"{tmp_path / 'my_rewards.py'}:length": 1.0}, "value_model": value, "eval_every": 1},
    )
    finals = stage.run(context)
    assert finals["ppo/best_update"] in {1.0, 2.0, 3.0}
    trained = AutoModelForSeq2SeqLM.from_pretrained(context.out / "model")
    assert not torch.equal(
        trained.encoder.block[0].layer[0].SelfAttention.q.weight, t5.encoder.block[0].layer[0].SelfAttention.q.weight
    )
    assert (context.out / "value" / "head.safetensors").is_file()
    if value == "separate":
        AutoModelForSeq2SeqLM.from_pretrained(context.out / "value" / "model")


def test_what_a_training_leaves_is_what_another_goes_on_from(make: Callable[..., Context], tmp_path: Path) -> None:
    """Weights, optimizer and controllers, but a new count of updates."""
    first = make("first", ppo={"kl_control": "adaptive", "kl_horizon": 20.0, "scale_scores": True})
    stage.run(first)
    second = make("second", ppo={"kl_control": "adaptive", "kl_horizon": 20.0, "scale_scores": True})
    prepare = stage.Trainer.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            stage.Trainer, "prepare", lambda self: (setattr(self, "start_from", first.out / "state"), prepare(self))[1]
        )
        patch.setattr(stage.Trainer, "step", lambda self, update: pytest.fail("stop") if update > 1 else _state(self))
        with pytest.raises(_StateError) as found:
            stage.run(second)
    progress, weights, steps = found.value.args
    saved = json.loads((first.out / "state" / "controllers.json").read_text())
    assert (progress.update, progress.kl_coef, list(progress.scores)) == (0, saved["kl_coef"], saved["scores"])
    assert saved["kl_coef"] != 0.05
    assert all(
        torch.equal(weight, weights[name]) for name, weight in load_file(first.out / "state/policy.safetensors").items()
    )
    assert steps == {6}


class _StateError(Exception):
    """Carries a trainer's state out of a stage."""


def _state(trainer: Any) -> None:
    weights = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    steps = {int(state["step"]) for state in trainer.learner.optimizer.state_dict()["state"].values()}
    raise _StateError(trainer.progress, weights, steps)


def test_evaluations_with_the_held_out_model_and_functions_as_judges(
    make: Callable[..., Context], tmp_path: Path, toy: Any
) -> None:
    torch.manual_seed(2)
    other = loading.reward_from_policy(toy.shared / "sft/model")
    other.config.score_mean, other.config.score_std = -0.5, 1.0
    options = {"eval_every": 2, "eval_prompts": 5, "judges": {"size": f"{tmp_path / 'my_rewards.py'}:length"}}
    context = make(ppo=options)
    tokenizer = loading.load_tokenizer(toy.shared / "sft/model")
    loading.save(other, tokenizer, context.inputs["reward"] / "held_out")
    finals = stage.run(context)
    table = pq.read_table(context.out / "evaluations.parquet").to_pydict()
    judged = [f"judge/{name}{end}" for name in ("held_out", "size") for end in ("", "_stderr")]
    assert list(table) == [
        *("update", "score", "score_stderr", "kl", "response_length_mean", "eos_rate", "reward/model", *judged),
        *("overoptimised/held_out", "overoptimised/size"),
    ]
    assert table["update"] == [0, 2, 3]
    assert finals["ppo/best_judge/held_out"] == max(table["judge/held_out"][1:])
    assert {"ppo/overoptimised", "ppo/overoptimised/held_out", "ppo/overoptimised/size"} <= finals.keys()
    assert table["judge/held_out"] != table["score"]
    assert not (make(ppo={"eval_every": 0}).out / "evaluations.parquet").exists()

    again = make("killed", Killer(2), ppo=options)
    with pytest.raises(KeyboardInterrupt):
        stage.run(again)
    again = make("killed", ppo=options)
    assert stage.run(again) == finals
    one, two = ((of.out / "evaluations.parquet").read_bytes() for of in (context, again))
    assert one == two


@pytest.mark.parametrize("rank", [0, 2])
def test_a_kill_changes_nothing(rank: int, make: Callable[..., Context]) -> None:
    straight = make("straight", model={"lora_rank": rank})
    expected = stage.run(straight)
    with pytest.raises(KeyboardInterrupt):
        stage.run(make("killed", Killer(2), model={"lora_rank": rank}))
    again = make("killed", model={"lora_rank": rank})
    assert stage.run(again) == expected
    for name in ("model", "value_model"):
        one, two = (load_file(context.out / name / "model.safetensors") for context in (straight, again))
        assert one.keys() == two.keys()
        assert all(torch.equal(weight, two[key]) for key, weight in one.items())
    assert pq.read_table(straight.out / "samples.parquet").equals(pq.read_table(again.out / "samples.parquet"))


def test_without_reward_stage_the_value_model_starts_from_the_policy_at_zero(
    make: Callable[..., Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make(off=("reward", "judge"), ppo={"rewards": {f"{tmp_path / 'my_rewards.py'}:length": 1.0}})
    started: dict[str, Any] = {}
    train = stage.Trainer.train

    def spy(self: Any) -> dict[str, float]:
        started["head"] = self.value_model.model.score.weight.clone()
        started["trunk"] = torch.equal(
            self.value_model.model.transformer.wte.weight, self.policy.model.transformer.wte.weight
        )
        return train(self)

    monkeypatch.setattr(stage.Trainer, "train", spy)
    stage.run(context)
    assert not started["head"].any()
    assert started["trunk"]


def test_a_reward_model_of_another_kind_scores_but_is_no_value_model(make: Callable[..., Context], toy: Any) -> None:
    context = make()
    torch.manual_seed(0)
    config = {"init": "random", "architecture": "llama", "layers": 1, "width": 16, "heads": 2, "context": 64}
    section = PipelineConfig.model_validate({"data": {"demonstrations": "x"}, "reward": "off", "judge": "off",
                                             "ppo": "off", "model": config}).model  # fmt: skip
    tokenizer = loading.load_tokenizer(toy.shared / "sft/model")
    directory = context.inputs["reward"] / "model"
    loading.save(random_model(section, tokenizer), tokenizer, directory.parent / "llama")
    loading.save(loading.reward_from_policy(directory.parent / "llama"), tokenizer, directory)
    finals = stage.run(context)
    assert finals["ppo/episodes"] == 24
    assert loading.load_reward_model(context.out / "value_model").config.model_type == "gpt2"


def test_a_prompt_that_leaves_no_room_is_refused(make: Callable[..., Context]) -> None:
    with pytest.raises(DataError, match=r"prompts/train, row \d: \d+ prompt tokens and ppo.max_new_tokens 46"):
        stage.run(make(ppo={"max_new_tokens": 46}))


@pytest.mark.parametrize(("texts", "message"), [([], "has no row"), (["a", ""], r"row 1: the prompt '' has no token")])
def test_prompts_that_cannot_be_used_are_refused(texts: list[str], message: str, make: Callable[..., Context]) -> None:
    context = make()
    pq.write_table(pa.table({"prompt": pa.array(texts, pa.string())}), context.input("prepare/prompts/train.parquet"))
    with pytest.raises(DataError, match=message):
        stage.run(context)


def test_a_reward_that_is_not_there_is_refused(make: Callable[..., Context]) -> None:
    with pytest.raises(ConfigError, match="cannot be imported"):
        stage.run(make(ppo={"rewards": {"no.such.module:function": 1.0}}))


def test_a_policy_that_is_not_there_is_refused(make: Callable[..., Context], tmp_path: Path) -> None:
    context = make()
    context = Context(
        "ppo",
        context.config,
        {**context.inputs, "sft": tmp_path / "nowhere"},
        context.out,
        context.checkpoints,
        context.tracker,
    )
    with pytest.raises(ModelError, match="nowhere"):
        stage.run(context)


@pytest.mark.parametrize(("precision", "expected"), [("auto", "no"), ("fp32", "no")])
def test_precision_on_a_cpu(precision: str, expected: str, make: Callable[..., Context]) -> None:
    accelerator = stage.make_accelerator(make(resources={"precision": precision}).config.resources)
    assert accelerator.mixed_precision == expected
    assert accelerator.device.type == "cpu"
