"""Tiny models and tokenizers, and a trainer over them. Everything is float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from rlhf.config.ppo_options import Settings
from rlhf.models.adapt import add_lora
from rlhf.models.loading import score_head
from rlhf.ppo.batching import Prompts
from rlhf.ppo.core import Running
from rlhf.ppo.policy import Policy, ValueModel, zero_head
from rlhf.ppo.sequences import Sequences
from rlhf.ppo.trainer import Trainer
from rlhf.rewards import FunctionScorer, Rewards
from rlhf.tracking.tracker import NullTracker

ARCHITECTURES = ("gpt2", "llama", "falcon", "gpt_bigcode", "t5")
SPREAD = {"gpt2": 8.0, "llama": 8.0, "falcon": 8.0, "gpt_bigcode": 8.0, "t5": 1.0}  # of random weights
EOS = {"gpt2": 5.0, "llama": 8.0, "falcon": 3.0, "gpt_bigcode": -8.0, "t5": 5.0}  # its row of the output layer
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


def configuration(architecture: str) -> PreTrainedConfig:
    """Two layers of width 16 with two heads. There is dropout, as in many published models: training turns it off."""
    common: dict[str, Any] = {"vocab_size": 270, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    gpt: dict[str, Any] = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64, "attn_pdrop": 0.1}
    other: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    match architecture:
        case "gpt2":
            return GPT2Config(**common, **gpt)
        case "gpt_bigcode":
            return GPTBigCodeConfig(**common, **gpt)
        case "llama":
            shape = {"intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 64}
            return LlamaConfig(**common, **other, **shape)
        case "falcon":
            return FalconConfig(**common, **other, hidden_dropout=0.1, alibi=False)
        case "t5":
            shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
            return T5Config(**common, **shape, decoder_start_token_id=1)
    raise ValueError(architecture)


def policy_model(architecture: str = "gpt2", seed: int = 0) -> PreTrainedModel:
    """A tiny language model: distributions far from uniform, and some responses that end early."""
    torch.manual_seed(seed)
    config = configuration(architecture)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(SPREAD[architecture])
        model.get_output_embeddings().weight[0].mul_(EOS[architecture])
    return model.eval()


def value_model(architecture: str = "gpt2", seed: int = 1) -> PreTrainedModel:
    """A tiny classifier with one output."""
    config = configuration(architecture)
    config.num_labels = 1
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(score_head(model).weight, std=0.3)
    return model.eval()


def make_value(architecture: str, lora: int) -> ValueModel:
    """A value model: a classifier, or, for an encoder-decoder, a head on its decoder."""
    if architecture == "t5":
        value = ValueModel.like(Policy(policy_model(architecture, seed=1)))
        assert value.head is not None
        torch.manual_seed(1)
        torch.nn.init.normal_(value.head.weight, std=0.3)
    else:
        value = ValueModel(value_model(architecture))
    if lora:
        value.model = add_lora(value.model, lora, 8.0)
    return value


@cache
def _models(architecture: str, lora: int, shared: bool) -> tuple[Policy, ValueModel | None, Tensor]:
    """A policy and its value model, to be copied since making them takes longer; and torch's random state after it."""
    model: Any = policy_model(architecture)
    torch.manual_seed(2)
    policy = Policy(add_lora(model, lora, 8.0) if lora else model)
    value = None if shared else make_value(architecture, lora)
    if value is None:
        policy.value_head = zero_head(policy.language_model)
        torch.nn.init.normal_(policy.value_head.weight, std=0.3)
    return policy, value, torch.get_rng_state()


def new_models(architecture: str, lora: int, shared: bool) -> tuple[Policy, ValueModel | None]:
    """A policy and its value model (none if it is ``shared``), as if they were made now."""
    policy, value, random_state = _models(architecture, lora, shared)
    torch.set_rng_state(random_state)
    return deepcopy((policy, value))


def odd(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A reward: the share of characters with an odd code."""
    return [sum(ord(c) % 2 for c in response) / (len(response) + 1) for response in responses]


def even(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A judge: the share of characters with an even code, and noise from the global generators."""
    share = [sum(ord(c) % 2 == 0 for c in response) / (len(response) + 1) for response in responses]
    return [value + 0.01 * torch.rand(1).item() for value in share]


def words(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A judge: the number of words."""
    return [float(len(response.split())) for response in responses]


JUDGES: dict[str, Callable[..., list[float]]] = {"even": even, "words": words}


def settings(**changes: Any) -> Settings:
    """A small section ``ppo``."""
    small: dict[str, Any] = {
        "updates": 4,
        "episodes": 8,
        "epochs": 2,
        "max_new_tokens": 7,
        "learning_rate": 1e-3,
        "checkpoint_every": 2,
        "log_samples_every": 2,
    }
    return Settings(**(small | changes))


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
    return {f"{k}.{n}": p.detach().clone() for k, m in both.items() if m is not None for n, p in m.named_parameters()}


def gradients(trainer: Trainer) -> Tensor:
    """The gradients of all weights that learn, in one vector."""
    return torch.cat([p.grad.flatten() for p in trainer.learner.parameters if p.grad is not None])


def first_update(trainer: Trainer) -> dict[str, Any]:
    """The first update's gradient, the numbers of its first step, and its metrics."""
    trainer.prepare()
    rollout = trainer.rollout(1)
    experience = trainer.advantages(rollout, trainer.score(rollout, 1))
    trainer.progress.scores = Running()  # as if that had not been
    numbers = trainer.learner.backward(experience, torch.arange(len(rollout.responses)))
    gradient = gradients(trainer)
    trainer.learner.optimizer.zero_grad()
    return {"gradient": gradient, "numbers": list(numbers), "metrics": trainer.step(1)}


def new_trainer(
    checkpoints: Path,
    architecture: str = "gpt2",
    lora: int = 0,
    separate_pad: bool = True,
    reward: Callable[..., Sequence[float]] = odd,
    judges: Sequence[str] = (),
    **changes: Any,
) -> Trainer:
    """A trainer, always with the same initial weights; ``changes`` are to its settings, ``judges`` of ``JUDGES``."""
    chosen, tokens = settings(**changes), tokenizer(separate_pad)
    policy, value = new_models(architecture, lora, chosen.value_model == "shared")
    return Trainer(
        settings=chosen,
        policy=policy,
        value_model=value,
        rewards=Rewards({"odd": (1.0, FunctionScorer(reward, "odd"))}),
        prompts=Prompts(WORDS, tokens(WORDS)["input_ids"], {"id": list(range(len(WORDS)))}),
        held_out=Prompts(WORDS[::-1], tokens(WORDS[::-1])["input_ids"], {"id": list(range(len(WORDS)))}),
        judges={name: FunctionScorer(JUDGES[name], name) for name in judges},
        tokenizer=tokens,
        accelerator=Accelerator(cpu=True),
        tracker=Recorder(),
        checkpoints=checkpoints,
        seed=3,
    )


@dataclass(frozen=True)
class Tiny:
    """What the tests make their things from."""

    tokenizer: Callable[..., PreTrainedTokenizerFast] = tokenizer
    policy_model: Callable[..., PreTrainedModel] = policy_model
    value_model: Callable[..., PreTrainedModel] = value_model
    make_value: Callable[..., ValueModel] = make_value
    settings: Callable[..., Settings] = settings
    sequences: Callable[..., Sequences] = sequences
    recorder: Callable[[], Recorder] = Recorder
    weights: Callable[[Trainer], dict[str, Tensor]] = weights
    gradients: Callable[[Trainer], Tensor] = gradients
    first_update: Callable[[Trainer], dict[str, Any]] = first_update
    trainer: Callable[..., Trainer] = new_trainer
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


@pytest.fixture
def shifted() -> Callable[[Trainer], None]:
    """Moves a prepared trainer's policy away from its reference, as some updates would."""

    def shift(trainer: Trainer) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in trainer.learner.trainable[0]:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))

    return shift
