"""PPO finds the policy that the theory says, on a problem small enough to write it down.

The maximum of E[r(y)] - beta KL(pi || pi_ref) over all policies is pi*(y) = pi_ref(y) exp(r(y) / beta) / Z, with
pi_ref taken at the sampling temperature. Responses are one or two tokens of a vocabulary of five, end-of-sequence
among them, so that all of pi* is 21 numbers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from rlhf.models.adapt import add_lora
from rlhf.ppo.batching import Prompts
from rlhf.ppo.generation import generate
from rlhf.ppo.policy import Policy, ValueModel, zero_head
from rlhf.ppo.sequences import Sequences
from rlhf.ppo.trainer import Trainer
from rlhf.rewards import Rewards

EOS, WORDS, BETA, TEMPERATURE = 0, ["<e>", "a", "b", "c", "d"], 0.5, 0.7
PROMPT = [1, 2]  # two words: to one layer without absolute positions, "a" and "a a" are the same
DRAWS = 16384  # responses that the learned policy is judged by
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
    prompts = torch.tensor([PROMPT] * count)
    sequences = Sequences(prompts, torch.full((count,), len(PROMPT)), padded, lengths)
    with torch.no_grad():
        logprobs = policy(sequences, TEMPERATURE).logprobs.double()
    total = torch.zeros(count, dtype=torch.float64).index_add(0, sequences.mask.nonzero()[:, 0], logprobs)
    return total.exp()


def make_model(architecture: str) -> PreTrainedModel:
    """A tiny policy over the five words, far from uniform."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 5, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    gpt: dict[str, Any] = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 8}
    other: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    config: PreTrainedConfig
    match architecture:
        case "gpt2":
            config = GPT2Config(**shape, **gpt)
        case "gpt_bigcode":
            config = GPTBigCodeConfig(**shape, **gpt)
        case "llama":
            config = LlamaConfig(**shape, **other, intermediate_size=32)
        case "falcon":
            config = FalconConfig(**shape, **other, alibi=False)
        case _:
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
            config = T5Config(**shape, **sizes, decoder_start_token_id=0)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and architecture != "t5":
                parameter.mul_(10.0)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<e>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", pad_token="<e>")


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * (p - q).abs().sum().item()


def sampled(policy: Policy, count: int) -> Tensor:
    """Shares of the 21 responses among ``count`` that the policy generates."""
    uniforms = torch.rand(count, 2, generator=torch.Generator().manual_seed(17))
    prompts, lengths = torch.tensor([PROMPT] * count), torch.full((count,), len(PROMPT))
    made = generate(policy, prompts, lengths, uniforms, TEMPERATURE, EOS)
    found = Counter(tuple(row[:n]) for row, n in zip(made.responses.tolist(), made.lengths.tolist(), strict=True))
    return torch.tensor([found[response] / count for response in RESPONSES], dtype=torch.float64)


def monte_carlo_error(optimum: Tensor, count: int) -> float:
    """The total variation that ``count`` draws from the optimum itself do not exceed in 999 of 1,000 cases."""
    shares = np.random.default_rng(18).multinomial(count, optimum.numpy(), size=1000) / count
    return float(np.quantile(0.5 * np.abs(shares - optimum.numpy()).sum(1), 0.999))


@pytest.mark.parametrize(
    ("architecture", "lora", "value"),
    [
        *((name, 0, "separate") for name in ("gpt2", "llama", "falcon", "gpt_bigcode", "t5")),
        ("gpt2", 8, "separate"),
        ("t5", 8, "separate"),
        ("gpt2", 0, "shared"),
    ],
)
def test_ppo_approaches_the_known_optimum(architecture: str, lora: int, value: str, tiny: Any, tmp_path: Path) -> None:
    assert len(REWARDS) == len(RESPONSES) == 21
    model: Any = make_model(architecture)
    start = distribution(Policy(make_model(architecture)))
    value_model = ValueModel.like(Policy(model)) if value == "separate" else None
    policy = Policy(add_lora(model, lora, 4.0 * lora) if lora else model)
    policy.value_head = zero_head(policy.language_model) if value == "shared" else None
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
            value_model=value,
            checkpoint_every=1000,
        ),
        policy=policy,
        value_model=value_model,
        rewards=Rewards({"table": (1.0, score)}),
        prompts=Prompts(["a b"], [PROMPT], {}),
        tokenizer=tokenizer(),
        accelerator=Accelerator(cpu=True),
        tracker=tiny.recorder(),
        checkpoints=tmp_path,
        seed=0,
    )
    assert start.sum().item() == pytest.approx(1.0, abs=1e-6)
    optimum = start * (torch.tensor(list(REWARDS.values()), dtype=torch.float64) / BETA).exp()
    optimum /= optimum.sum()
    trainer.train()
    last = trainer.tracker.points[-1][1]
    error = monte_carlo_error(optimum, DRAWS)
    assert total_variation(start, optimum) > 4.0 * error
    assert total_variation(sampled(trainer.policy, DRAWS), optimum) < error
    assert total_variation(distribution(trainer.policy), optimum) < error
    assert last["ppo/clip_fraction"] == 0.0  # else the clip could hold it back
