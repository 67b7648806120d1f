"""Every combination of architecture, weights, value model and reward trains; the others are refused at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from rlhf.config.ppo import Ppo
from rlhf.config.ppo_options import Settings
from rlhf.errors import ConfigError
from rlhf.ppo.policy import zero_head
from rlhf.ppo.trainer import Trainer
from rlhf.rewards import FunctionScorer, RewardModel, Rewards

ARCHITECTURES = ["gpt2", "llama", "falcon", "gpt_bigcode", "t5"]
REWARDS = ["function", "model", "other model", "sum"]
MakeTrainer = Callable[..., Trainer]


@cache  # nothing changes them
def make_rewards(kind: str, tiny: Any) -> Rewards:
    """A function; a causal reward model; one of another architecture and tokenizer; a weighted sum."""
    function = FunctionScorer(lambda prompts, responses: [len(response) / 10 for response in responses], "length")
    own = RewardModel(tiny.value_model("llama").requires_grad_(False), tiny.tokenizer())
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertForSequenceClassification(BertConfig(**shape, intermediate_size=8, num_labels=1)).eval()
    other = RewardModel(encoder.requires_grad_(False), tiny.tokenizer(separate_pad=False))
    return {
        "function": Rewards({"length": (1.0, function)}),
        "model": Rewards({"model": (1.0, own)}),
        "other model": Rewards({"model": (1.0, other)}),
        "sum": Rewards({"length": (0.5, function), "model": (-2.0, own)}),
    }[kind]


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize(
    ("architecture", "lora", "value"), list(itertools.product(ARCHITECTURES, [0, 2], ["separate", "shared"]))
)
def test_every_combination_trains(
    architecture: str, lora: int, value: str, reward: str, make_trainer: MakeTrainer, tiny: Any
) -> None:
    trainer = make_trainer(architecture, lora=lora, value_model=value, updates=3, eval_every=3, learning_rate=3e-3)
    trainer.rewards = make_rewards(reward, tiny)
    before = tiny.weights(trainer)
    finals = trainer.train()
    assert all(math.isfinite(number) for number in finals.values())
    after = tiny.weights(trainer)
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    learns = {f"policy.{n}" for n, p in trainer.policy.named_parameters() if p.requires_grad}
    assert changed & learns
    assert any(name.startswith("value.") or "value_head" in name for name in changed)
    kls = [(values["ppo/kl"], values["ppo/kl_stderr"]) for update, values in trainer.tracker.points if update]
    assert kls[0][0] == pytest.approx(0.0, abs=1e-5)
    assert kls[-1][0] != 0.0
    assert all(kl > -4.0 * error - 1e-5 for kl, error in kls), kls  # never negative beyond sampling error
    assert trainer.tracker.points[-1][1]["ppo/eval/kl"] > 0.0  # exact over the vocabulary: never negative at all
    assert finals.keys() >= {f"ppo/{name}" for name in ("best_update", "best_score", "best_kl")}


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_estimator": "k2"},
        {"kl_estimator": "k3"},
        {"kl_control": "adaptive", "kl_target": 1.0, "kl_horizon": 50.0},
        {"lr_target_kl": 0.01},
        {"early_stop_kl": 0.001},
        {"warmup_updates": 2},
        {"whiten_rewards": True, "whiten_advantages": False},
        {"scale_scores": True, "score_clip": 1.0},
        {"missing_eos": "replace"},
        {"missing_eos": "penalty", "missing_eos_value": 0.3},
        {"entropy_coef": 0.01, "schedule": "constant", "value_learning_rate": 1e-2, "weight_decay": 0.1},
        {"gamma": 0.9, "lam": 0.5, "minibatches": 4, "micro_batch_tokens": 30},
        {"generation": "static"},
        {"generation": "transformers", "value_model": "shared"},
        {"generation": "transformers"},
        {"eval_every": 1, "eval_temperature": 0.0, "kl_budget": 0.5, "best_metric": "reward/odd"},
    ],
    ids=str,
)
def test_every_option_trains(changes: dict[str, Any], make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(**changes)
    finals = trainer.train()
    assert all(math.isfinite(number) for number in finals.values())
    points = [values for update, values in trainer.tracker.points if update]
    assert all(values["ppo/kl"] > -4.0 * values["ppo/kl_stderr"] - 1e-5 for values in points)


REFUSED = [
    ({"episodes": 8, "minibatches": 3}, "minibatches 3 must divide episodes 8"),
    ({"warmup_updates": 100}, "warmup_updates 100 leaves none of the 100 updates"),
    ({"warmup_updates": 1, "value_model": "shared"}, "its trunk is the policy's"),
    ({"lr_target_kl": 0.1, "epochs": 1}, "lr_target_kl needs more than one optimizer step"),
    ({"kl_budget": 5.0}, "set eval_every"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_options_that_do_not_go_together_are_refused_when_they_are_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**changes)
    with pytest.raises(ValueError, match=message):  # pydantic's, as the configuration file is read
        Ppo(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lam": 1.5}, r"ppo\.lam is 1\.5; it must be at most 1"),
        ({"learning_rate": 0.0}, r"ppo\.learning_rate is 0\.0; it must be over 0"),
        ({"updates": 0}, r"ppo\.updates is 0; it must be at least 1"),
        ({"kl_coef": math.nan}, r"ppo\.kl_coef is nan; it must be a finite number"),
        ({"schedule": "cosine"}, r"ppo\.schedule is 'cosine'; allowed are linear, constant"),
        ({"generation": "statc"}, r"ppo\.generation is 'statc'; allowed are auto, dynamic, static, transformers"),
    ],
)
def test_values_outside_their_limits_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**changes)
    with pytest.raises(ValueError, match=next(iter(changes))):
        Ppo(**changes)


def test_the_configuration_has_the_options_of_the_engine() -> None:
    """One list of options: same names, same defaults."""
    section = Ppo().model_dump()
    assert {name: section[name] for name in vars(Settings())} == vars(Settings())
    assert section.keys() - vars(Settings()).keys() == {"enabled", "rewards", "judges"}


@pytest.mark.parametrize("value", ["separate", "shared"])
def test_models_that_do_not_fit_the_settings_are_refused(value: str, make_trainer: MakeTrainer, tiny: Any) -> None:
    trainer = make_trainer(value_model=value)
    if value == "separate":
        trainer.policy.value_head = zero_head(trainer.policy.language_model)
    else:
        trainer.value_model = tiny.make_value("gpt2", 0)
    with pytest.raises(ConfigError, match=rf"ppo\.value_model is `{value}`"):
        trainer.train()
