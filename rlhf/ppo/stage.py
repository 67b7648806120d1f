"""The pipeline's ppo stage: from the SFT policy, a reward and prompts to a better policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf import models, rewards, training
from rlhf.errors import DataError
from rlhf.ppo.batching import Prompts
from rlhf.ppo.policy import CausalPolicy, ValueModel
from rlhf.ppo.state import Sample
from rlhf.ppo.trainer import Trainer

if TYPE_CHECKING:
    from rlhf.config import PipelineConfig, Resources
    from rlhf.context import Context


def run(context: Context) -> dict[str, float]:
    """Train; write ``model/`` (adapters merged), ``value_model/`` and two tables; return final metrics.

    ``samples.parquet`` has the columns update, prompt, response and score; ``curves.parquet`` one row for each update:
    step, and the metrics that the report draws.

    Raises:
        ModelError: a model cannot be loaded, or PPO cannot train it.
        ConfigError: a reward function cannot be loaded.
        DataError: there are no prompts, or one leaves no room for a response.
        RewardError: a reward failed.
        TrainingError: a score, loss or gradient is not finite.
    """
    config = context.config
    training.set_threads(config.resources)
    training.seed_everything(config.seed)
    accelerator = make_accelerator(config.resources)
    where = context.model_options(context.sft_model())
    tokenizer = models.load_tokenizer(context.sft_model(), **where)
    base = models.load_policy(context.sft_model(), **where)
    reward_model = _reward_model(context, accelerator.device)
    trainer = Trainer(
        settings=config.ppo,
        policy=CausalPolicy(_trainable(base, config)),
        value_model=ValueModel(_trainable(_value_model(context), config)),
        rewards=rewards.make_rewards(config.ppo.rewards, reward_model),
        prompts=load_prompts(context.input("prepare/prompts/train.parquet"), tokenizer),
        tokenizer=tokenizer,
        accelerator=accelerator,
        tracker=context.tracker,
        checkpoints=context.checkpoints,
        seed=config.seed,
        reference=None if config.model.lora_rank else _reference(context),
    )
    trainer.policy.check()
    check_room(trainer.prompts, config.ppo.max_new_tokens, base)
    finals = trainer.train()
    if accelerator.is_main_process:
        models.save(_plain(trainer.policy.model), tokenizer, context.out / "model")
        models.save(_plain(trainer.value_model.model), tokenizer, context.out / "value_model")
        write_samples(context.out / "samples.parquet", trainer.progress.samples)
        write_curves(context.out / "curves.parquet", trainer.progress.history)
    return finals


def make_accelerator(resources: Resources) -> Accelerator:
    """Device and precision of the forward passes; with ``auto``, bf16 where there is CUDA and float32 elsewhere."""
    device = training.device_of(resources)
    low = resources.precision == "bf16" or (resources.precision == "auto" and device.type == "cuda")
    return Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if low else "no")


def load_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Read a prompts file; the columns beside ``prompt`` are for the rewards.

    Raises:
        DataError: it has no row, or a prompt has no token.
    """
    columns: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    texts = columns.pop("prompt")
    if not texts:
        raise DataError(f"{path} has no row, so there is nothing to train on; lower data.test_fraction")
    token_ids = models.prompt_token_ids(tokenizer, texts)
    for row, ids in enumerate(token_ids):
        if not ids:
            raise DataError(f"{path}, row {row}: the prompt {texts[row]!r} has no token; take it out")
    return Prompts(texts, token_ids, columns)


def check_room(prompts: Prompts, new_tokens: int, model: PreTrainedModel) -> None:
    """See that each prompt with a response of the longest kind fits into the model's context.

    Raises:
        DataError: one does not.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(range(len(prompts)), key=lambda row: len(prompts.token_ids[row]))
    tokens = len(prompts.token_ids[longest])
    if limit is not None and tokens + new_tokens > limit:
        raise DataError(
            f"prompts/train, row {longest}: {tokens} prompt tokens and ppo.max_new_tokens {new_tokens} are more than "
            f"the model's context of {limit}; lower ppo.max_new_tokens, or set data.max_prompt_tokens to at most "
            f"{limit - new_tokens} with data.too_long: drop"
        )


def write_samples(path: Path, samples: list[Sample]) -> None:
    """Write the table of samples."""
    columns = {name: [getattr(sample, name) for sample in samples] for name in Sample._fields}
    pq.write_table(pa.table(columns), path)


def write_curves(path: Path, history: dict[str, list[float]]) -> None:
    """Write the curves of ``state.REMEMBERED``, one row for each update; no timings, which would change the digest."""
    updates = len(next(iter(history.values())))
    pq.write_table(pa.table({"step": list(range(1, updates + 1)), **history}), path)


def _value_model(context: Context) -> PreTrainedModel:
    reward = context.input("reward/model") if context.has("reward/model") else None
    return models.value_model_from(context.sft_model(), reward, **context.model_options(context.sft_model()))


def _reference(context: Context) -> CausalPolicy:
    where = context.model_options(context.sft_model())
    return CausalPolicy(models.load_policy(context.sft_model(), **where).requires_grad_(False))


def _reward_model(context: Context, device: torch.device) -> rewards.RewardModel | None:
    if "model" not in context.config.ppo.rewards:
        return None
    path, trusted = context.input("reward/model"), context.config.model.trust_remote_code
    model = models.load_reward_model(path, trust_remote_code=trusted).to(device).eval().requires_grad_(False)
    return rewards.RewardModel(model, models.load_tokenizer(path, trust_remote_code=trusted))


def _trainable(model: PreTrainedModel, config: PipelineConfig) -> Any:
    """The model as PPO trains it: no dropout, adapters if the configuration says so."""
    models.set_dropout_zero(model)
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return models.add_lora(model, config.model.lora_rank, config.model.lora_alpha) if config.model.lora_rank else model


def _plain(model: Any) -> PreTrainedModel:
    """The trained model with its adapters, if any, merged."""
    plain: PreTrainedModel = model if isinstance(model, PreTrainedModel) else models.merge_lora(model)
    return plain
