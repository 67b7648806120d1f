"""Samples of the SFT policy, to be judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from rlhf.models import loading
from rlhf.ppo import batching
from rlhf.ppo.batching import Prompts
from rlhf.ppo.checks import check_policy
from rlhf.ppo.policy import Policy
from rlhf.ppo.rollout import collect
from rlhf.training import computing

if TYPE_CHECKING:
    from rlhf.context import Context


def samples(context: Context, split: str, given: Sequence[str]) -> Iterator[list[str]]:
    """So many samples of the SFT policy to each of the given prompts of a split as ``judge.samples`` says.

    Raises:
        ModelError: the policy cannot be loaded.
        DataError: a prompt leaves no room for a response.
    """
    config, section = context.config, context.config.judge
    computing.set_up_cpu(config.resources)
    device = computing.device_of(config.resources)
    path = context.sft_model()
    tokenizer = loading.load_tokenizer(path, **context.model_options(path))
    with computing.quiet():
        model = loading.load_policy(path, **context.model_options(path), dtype=config.model.dtype)
        policy = Policy(model.to(device).eval())
    check_policy(policy)
    encoder = policy.language_model.config.is_encoder_decoder
    texts = [prompt for prompt in given for _ in range(section.samples)]
    prompts = Prompts(texts, loading.prompt_token_ids(tokenizer, texts, encoder), {})
    room = prompts.token_ids, section.max_new_tokens
    loading.check_room(*room, policy.language_model, f"prompts/{split}", "judge.max_new_tokens")
    size = section.batch_size * section.samples
    generator = batching.generator(config.seed, f"judge {split}")
    for start in range(0, len(texts), size):
        rows = range(start, min(start + size, len(texts)))
        uniforms = torch.rand(len(rows), section.max_new_tokens, generator=generator)
        with torch.no_grad(), computing.autocast(config.resources):
            found = collect(policy, tokenizer, prompts.select(rows), uniforms, section.temperature, device)
        for row in range(0, len(rows), section.samples):
            yield found.responses[row : row + section.samples]
        context.tracker.progress(start + len(rows), len(texts))
