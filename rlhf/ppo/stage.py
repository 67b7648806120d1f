"""The pipeline's ppo stage: from the SFT policy, a reward and prompts to a better policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf import rewards
from rlhf.errors import DataError
from rlhf.models import adapt, loading
from rlhf.ppo import state
from rlhf.ppo.batching import Prompts
from rlhf.ppo.policy import Policy, ValueModel, plain, zero_head
from rlhf.ppo.state import Sample
from rlhf.ppo.trainer import Trainer
from rlhf.store import disk
from rlhf.training import computing

if TYPE_CHECKING:
    from rlhf.config.pipeline import PipelineConfig
    from rlhf.config.resources import Resources
    from rlhf.context import Context


def run(context: Context) -> dict[str, float]:
    """Train and write; return final metrics.

    ``model/`` is the policy, adapters merged (the best evaluated one, with evaluations); ``adapter/`` the LoRA adapters
    by themselves. ``value_model/`` is a classifier; a value head on other models is ``value/head.safetensors``, with
    the model that it sits on in ``value/model/`` unless that is the policy. ``state/`` is what a training goes on from.
    ``samples.parquet`` has the columns update, prompt, response and score; ``curves.parquet`` one row for each update:
    step, and the metrics that the report draws. ``evaluations.parquet``, where there are any, has one row for each, the
    one before the first update included: update, score, score_stderr, kl, response_length_mean, eos_rate,
    ``reward/<part>``, and of each judge ``judge/<name>``, ``judge/<name>_stderr`` and ``overoptimised/<name>`` (1 where
    its alarm is on).

    Raises:
        ModelError: a model cannot be loaded, or PPO cannot train it.
        ConfigError: a reward function cannot be loaded, or options do not go together.
        DataError: there are no prompts, or one leaves no room for a response.
        RewardError: a reward failed.
        StorageError: there is no room on the disk.
        StoppedError: ``context.stop`` was asked, and a checkpoint is written.
        TrainingError: a score, loss or gradient is not finite.
    """
    config = context.config
    computing.set_up_cpu(config.resources)
    computing.seed_everything(config.seed)
    accelerator = make_accelerator(config.resources)
    where = context.model_options(context.sft_model())
    tokenizer = loading.load_tokenizer(context.sft_model(), **where)
    policy = Policy(loading.load_policy(context.sft_model(), **where, dtype=config.model.dtype))
    encoder = policy.language_model.config.is_encoder_decoder
    value_model = _value_model(context, policy) if config.ppo.value_model == "separate" else None
    policy.model = _trainable(policy.model, config)
    if value_model is None:
        policy.value_head = zero_head(policy.language_model)
    else:
        value_model.model = _trainable(value_model.model, config)
    held_out = context.input("prepare/prompts/validation.parquet") if config.ppo.eval_every else None
    trainer = Trainer(
        settings=config.ppo,
        policy=policy,
        value_model=value_model,
        rewards=_rewards(context, accelerator.device),
        judges=_judges(context, accelerator.device) if config.ppo.eval_every else {},
        prompts=load_prompts(context.input("prepare/prompts/train.parquet"), tokenizer, encoder),
        held_out=None if held_out is None else load_prompts(held_out, tokenizer, encoder),
        tokenizer=tokenizer,
        accelerator=accelerator,
        tracker=context.tracker,
        stop=context.stop,
        checkpoints=context.checkpoints,
        seed=config.seed,
    )
    loading.check_room(trainer.prompts.token_ids, config.ppo.max_new_tokens, policy.language_model, "prompts/train")
    if trainer.held_out is not None:
        room = trainer.held_out.token_ids, config.ppo.max_new_tokens
        loading.check_room(*room, policy.language_model, "prompts/validation")
    check_disk(trainer)
    finals = trainer.train()
    if accelerator.is_main_process:
        save(trainer, context.out)
    return finals | {"ppo/trainable_parameters": float(computing.trainable_parameters(trainer.policy))}


def check_disk(trainer: Trainer) -> None:
    """See that there is room for checkpoints, the best policies, and what ``save`` writes.

    Raises:
        StorageError: there is not.
    """
    both = [model for model in (trainer.policy, trainer.value_model) if model is not None]
    learning = sum(computing.trainable_parameters(model) for model in both)
    weights = learning * 4  # in float32
    best = 2 * computing.trainable_parameters(trainer.policy) * 4 if trainer.settings.eval_every else 0
    state = weights + learning * disk.MOMENTS_BYTES
    result = sum(computing.bytes_of(model.parameters()) for model in both) + state + best
    disk.check_room(trainer.checkpoints, disk.training_bytes(weights, learning, result), "ppo, with its checkpoints,")


def save(trainer: Trainer, out: Path) -> None:
    """Write everything that the stage leaves."""
    policy, value_model, tokenizer = trainer.policy, trainer.value_model, trainer.tokenizer
    state.export(trainer.checkpoints, out / "state")
    head = policy.value_head if value_model is None else value_model.head
    if value_model is not None:
        folder = out / "value_model" if head is None else out / "value" / "model"
        loading.save(_merged(value_model.model), tokenizer, folder)
    if head is not None:
        (out / "value").mkdir(exist_ok=True)
        save_file(head.state_dict(), out / "value" / "head.safetensors")
    if not isinstance(policy.model, PreTrainedModel):
        adapt.save_adapter(policy.model, out / "adapter")
    loading.save(_merged(policy.model), tokenizer, out / "model")
    write_samples(out / "samples.parquet", trainer.progress.samples)
    write_curves(out / "curves.parquet", trainer.progress.history)
    if trainer.progress.evaluations:
        pq.write_table(pa.Table.from_pylist(trainer.progress.evaluations), out / "evaluations.parquet")


def make_accelerator(resources: Resources) -> Accelerator:
    """Device and precision of the forward passes."""
    cpu = computing.device_of(resources).type == "cpu"
    return Accelerator(cpu=cpu, mixed_precision=computing.mixed_precision(resources))


def load_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, encoder: bool = False) -> Prompts:
    """Read a prompts file; the columns beside ``prompt`` are for the rewards.

    Raises:
        DataError: it has no row, or a prompt has no token.
    """
    columns: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    texts = columns.pop("prompt")
    if not texts:
        raise DataError(
            f"{path} has no row, so there is nothing to work on; change data.validation_fraction or test_fraction"
        )
    token_ids = loading.prompt_token_ids(tokenizer, texts, encoder)
    for row, ids in enumerate(token_ids):
        if not ids:
            raise DataError(f"{path}, row {row}: the prompt {texts[row]!r} has no token; take it out")
    return Prompts(texts, token_ids, columns)


def write_samples(path: Path, samples: list[Sample]) -> None:
    """Write the table of samples."""
    columns = {name: [getattr(sample, name) for sample in samples] for name in Sample._fields}
    pq.write_table(pa.table(columns), path)


def write_curves(path: Path, history: dict[str, list[float]]) -> None:
    """Write the curves of ``state.REMEMBERED``, one row for each update; no timings, which would change the digest."""
    updates = len(next(iter(history.values())))
    pq.write_table(pa.table({"step": list(range(1, updates + 1)), **history}), path)


def _value_model(context: Context, policy: Policy) -> ValueModel:
    if policy.language_model.config.is_encoder_decoder:
        return ValueModel.like(policy)
    reward = context.input("reward/model") if context.has("reward/model") else None
    where = context.model_options(context.sft_model())
    dtype = context.config.model.dtype
    return ValueModel(loading.value_model_from(context.sft_model(), reward, **where, dtype=dtype))


def _rewards(context: Context, device: torch.device) -> rewards.Rewards:
    model = _reward_model(context, "reward/model", device) if context.config.ppo.uses_model else None
    return rewards.make_rewards(context.config.ppo.rewards, model)


def _judges(context: Context, device: torch.device) -> dict[str, rewards.Scorer]:
    """What only judges: the held-out reward model, if there is one, and the functions that the configuration names."""
    found: dict[str, rewards.Scorer] = {}
    if context.has("reward/held_out"):
        found["held_out"] = _reward_model(context, "reward/held_out", device)
    functions = context.config.ppo.judges.items()
    return found | {name: rewards.make_scorer(judge.function, judge.arguments) for name, judge in functions}


def _reward_model(context: Context, part: str, device: torch.device) -> rewards.RewardModel:
    """A trained reward model, for scoring."""
    path, trusted = context.input(part), context.config.model.trust_remote_code
    model = loading.load_reward_model(path, trust_remote_code=trusted, dtype=context.config.model.dtype)
    model.to(device).eval().requires_grad_(False)
    adapt.fuse_gelu(model)
    return rewards.RewardModel(model, loading.load_tokenizer(path, trust_remote_code=trusted))


def _trainable(model: Any, config: PipelineConfig) -> Any:
    """The model as PPO trains it: with adapters and gradient checkpointing if the configuration says so."""
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return adapt.add_lora(model, config.model.lora_rank, config.model.lora_alpha) if config.model.lora_rank else model


def _merged(model: Any) -> PreTrainedModel:
    """The trained model with its adapters, if any, merged."""
    return plain(model) if isinstance(model, PreTrainedModel) else adapt.merge_lora(model)
