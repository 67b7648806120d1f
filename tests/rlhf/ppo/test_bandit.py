"""PPO finds the policy that the theory says, on a problem small enough to write it down.

The maximum of E[r(y)] - beta KL(pi || pi_ref) over all policies is pi*(y) = pi_ref(y) exp(r(y) / beta) / Z, with
pi_ref taken at the sampling temperature. Responses are one or two tokens of a vocabulary of five, end-of-sequence
among them, so that all of pi* is 21 numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from rlhf.models import random_model, score_head
from rlhf.ppo.batching import Prompts
from rlhf.ppo.policy import Policy, ValueModel
from rlhf.ppo.sequences import Sequences
from rlhf.ppo.trainer import Trainer
from rlhf.rewards import Rewards

EOS, WORDS, BETA, TEMPERATURE = 0, ["<e>", "a", "b", "c", "d"], 0.5, 0.7
RESPONSES = [(EOS,), *itertools.product(range(1, 5), range(5))]


def text(response: Sequence[int]) -> str:
    return " ".join(WORDS[token] for token in response if token != EOS)


REWARDS = {text(r): 0.25 * ((7 * i) % 5) for i, r in enumerate(RESPONSES)}


def score(prompts: Sequence[str], responses: Sequence[str], columns: Any) -> list[float]:
    return [REWARDS[response] for response in responses]


def distribution(policy: Policy) -> Tensor:
    """Probabilities of all 21 responses."""
    count = len(RESPONSES)
    padded = torch.tensor([(*response, 0)[:2] for response in RESPONSES])
    lengths = torch.tensor([len(response) for response in RESPONSES])
    sequences = Sequences(torch.full((count, 1), 1), torch.ones(count, dtype=torch.long), padded, lengths)
    with torch.no_grad():
        logprobs = policy(sequences, TEMPERATURE).logprobs.double()
    total = torch.zeros(count, dtype=torch.float64).index_add(0, sequences.mask.nonzero()[:, 0], logprobs)
    return total.exp()


def make_policy() -> PreTrainedModel:
    torch.manual_seed(0)
    shape: Any = SimpleNamespace(architecture="gpt2", layers=1, width=16, heads=2, context=8)
    model = random_model(shape, tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10.0)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<e>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", pad_token="<e>")


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * (p - q).abs().sum().item()


def test_ppo_approaches_the_known_optimum(tiny: Any, tmp_path: Path) -> None:
    assert len(REWARDS) == len(RESPONSES) == 21
    reference = Policy(make_policy())
    config = make_policy().config
    config.num_labels = 1
    value = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.zeros_(score_head(value).weight)
    trainer = Trainer(
        settings=tiny.settings(
            updates=60,
            episodes=256,
            epochs=4,
            max_new_tokens=2,
            temperature=TEMPERATURE,
            learning_rate=1e-2,
            kl_coef=BETA,
            whiten_advantages=False,
            max_grad_norm=10.0,
            value_coef=1.0,
            checkpoint_every=1000,
        ),
        policy=Policy(make_policy()),
        value_model=ValueModel(value),
        rewards=Rewards({"table": (1.0, score)}),
        prompts=Prompts(["a"], [[1]], {}),
        tokenizer=tokenizer(),
        accelerator=Accelerator(cpu=True),
        tracker=tiny.recorder(),
        checkpoints=tmp_path,
        seed=0,
        reference=reference,
    )
    start = distribution(reference)
    assert start.sum().item() == pytest.approx(1.0, abs=1e-6)
    optimum = start * (torch.tensor(list(REWARDS.values()), dtype=torch.float64) / BETA).exp()
    optimum /= optimum.sum()
    trainer.train()
    learned = distribution(trainer.policy)
    assert total_variation(start, optimum) > 0.2
    assert total_variation(learned, optimum) < 0.01  # one standard error of 256 draws is 0.03 for p = 0.5
    assert trainer.tracker.points[-1][1]["ppo/clip_fraction"] == 0.0  # else the clip could hold it back
