"""Tiny models and tokenizers, and a trainer over them. Everything is float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from rlhf.config import Ppo
from rlhf.models import add_lora, random_model, score_head, set_dropout_zero
from rlhf.ppo.batching import Prompts
from rlhf.ppo.policy import CausalPolicy, Sequences, ValueModel
from rlhf.ppo.trainer import Trainer
from rlhf.rewards import FunctionScorer, Rewards
from rlhf.tracker import NullTracker

WORDS = ["the cat sat", "a dog ran far away", "rain", "one two three four five six", "no", "tea at noon"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tokenizer(separate_pad: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; without a pad token of its own, pad is end-of-sequence."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(WORDS * 3, trainer)
    pad = "<|pad|>" if separate_pad else "<|end|>"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token=pad)


def policy_model(architecture: str = "gpt2", seed: int = 0) -> PreTrainedModel:
    """A tiny causal model: distributions far from uniform, and some responses that end early."""
    torch.manual_seed(seed)
    shape: Any = SimpleNamespace(architecture=architecture, layers=2, width=16, heads=2, context=64)
    model = random_model(shape, tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
        model.get_input_embeddings().weight[tokenizer().eos_token_id].mul_(5.0)
    return model


def value_model(architecture: str = "gpt2", seed: int = 1) -> PreTrainedModel:
    """A tiny classifier with one output."""
    config = policy_model(architecture).config
    config.num_labels = 1
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(score_head(model).weight, std=0.3)
    return model


def odd(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A reward: the share of characters with an odd code."""
    return [sum(ord(c) % 2 for c in response) / (len(response) + 1) for response in responses]


def settings(**changes: Any) -> Ppo:
    """A small section ``ppo``."""
    small: dict[str, Any] = {
        "rewards": {"some_module:odd": 1.0},
        "updates": 4,
        "episodes": 8,
        "epochs": 2,
        "max_new_tokens": 7,
        "learning_rate": 1e-3,
        "checkpoint_every": 2,
        "log_samples_every": 2,
    }
    return Ppo(**(small | changes))


def sequences(lengths: Sequence[tuple[int, int]], seed: int = 0, vocabulary: int = 270) -> Sequences:
    """Random token ids with these (prompt, response) lengths."""
    generator = torch.Generator().manual_seed(seed)
    starts, ends = (torch.tensor(column) for column in zip(*lengths, strict=True))
    shape = (len(lengths), int(starts.max())), (len(lengths), int(ends.max()))
    prompts, responses = (torch.randint(vocabulary, size, generator=generator) for size in shape)
    return Sequences(prompts, starts, responses, ends)


class Recorder(NullTracker):
    """A tracker that keeps what it gets."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.live: list[dict[str, float]] = []

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.points.append((step, dict(values)))

    def progress(self, done: int, total: int, **live: float) -> None:
        self.live.append({"done": done, "total": total, **live})

    def mark(self) -> int:
        return len(self.points)

    def rewind(self, mark: int) -> None:
        del self.points[mark:]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all weights of policy and value model."""
    both = {"policy": trainer.policy, "value": trainer.value_model}
    return {f"{k}.{n}": p.detach().clone() for k, m in both.items() for n, p in m.named_parameters()}


def gradients(trainer: Trainer) -> Tensor:
    """The gradients of all weights that learn, in one vector."""
    return torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None])


def first_update(trainer: Trainer) -> dict[str, Any]:
    """The first update's gradient, the numbers of its first step, and its metrics."""
    trainer.prepare()
    rollout = trainer.rollout(1)
    experience = trainer.advantages(rollout, trainer.score(rollout, 1))
    numbers = trainer.backward(experience, torch.arange(len(rollout.responses)), update=1)
    gradient = gradients(trainer)
    trainer.optimizer.zero_grad()
    return {"gradient": gradient, "numbers": list(numbers), "metrics": trainer.step(1)}


def new_trainer(
    checkpoints: Path,
    architecture: str = "gpt2",
    lora: int = 0,
    separate_pad: bool = True,
    reward: Callable[..., Sequence[float]] = odd,
    **changes: Any,
) -> Trainer:
    """A trainer, always with the same initial weights; ``changes`` are to its settings."""
    policy, value = policy_model(architecture), value_model(architecture)
    tokens = tokenizer(separate_pad)
    reference = None if lora else CausalPolicy(policy_model(architecture).requires_grad_(False))
    wrapped: list[Any] = [policy, value]
    if lora:
        torch.manual_seed(2)
        wrapped = [add_lora(policy, lora, 8.0), add_lora(value, lora, 8.0)]
    for model in wrapped:
        set_dropout_zero(model)
    return Trainer(
        settings=settings(**changes),
        policy=CausalPolicy(wrapped[0]),
        value_model=ValueModel(wrapped[1]),
        rewards=Rewards({"odd": (1.0, FunctionScorer(reward, "odd"))}),
        prompts=Prompts(WORDS, tokens(WORDS)["input_ids"], {"id": list(range(len(WORDS)))}),
        tokenizer=tokens,
        accelerator=Accelerator(cpu=True),
        tracker=Recorder(),
        checkpoints=checkpoints,
        seed=3,
        reference=reference,
    )


@dataclass(frozen=True)
class Tiny:
    """What the tests make their things from."""

    tokenizer: Callable[..., PreTrainedTokenizerFast] = tokenizer
    policy_model: Callable[..., PreTrainedModel] = policy_model
    value_model: Callable[..., PreTrainedModel] = value_model
    settings: Callable[..., Ppo] = settings
    sequences: Callable[..., Sequences] = sequences
    recorder: Callable[[], Recorder] = Recorder
    weights: Callable[[Trainer], dict[str, Tensor]] = weights
    gradients: Callable[[Trainer], Tensor] = gradients
    first_update: Callable[[Trainer], dict[str, Any]] = first_update
    words: tuple[str, ...] = tuple(WORDS)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """Makers of tiny things."""
    return Tiny()


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """``new_trainer``, with checkpoints below the test's folder unless told otherwise."""

    def make(*arguments: Any, checkpoints: Path | None = None, **changes: Any) -> Trainer:
        return new_trainer(checkpoints or tmp_path / "checkpoints", *arguments, **changes)

    return make


@pytest.fixture
def experience() -> Callable[..., Any]:
    """A prepared trainer's experience of an update, the advantages not whitened, and its rewards."""

    def of(trainer: Trainer, update: int = 1) -> Any:
        rollout = trainer.rollout(update)
        return trainer.advantages(rollout, trainer.score(rollout, update))

    return of
