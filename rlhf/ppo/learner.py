"""Optimizer steps: the gradients of one minibatch, taken in micro-batches, and what there is to say about them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf.config.ppo_options import Settings
from rlhf.models import adapt
from rlhf.ppo import batching, core
from rlhf.ppo.policy import Policy, ValueModel
from rlhf.ppo.rollout import Experience
from rlhf.ppo.sequences import unpack


class Step(NamedTuple):
    """One optimizer step. All but the last three are means over the response tokens of the minibatch."""

    policy_loss: float
    value_loss: float
    approx_kl: float  # nats per token
    clip_fraction: float
    value_clip_fraction: float
    ratio_mean: float
    ratio_max: float
    grad_norm: float  # before clipping
    overflow: bool  # gradients beyond fp16: the step is not taken, and the next one has a smaller loss scale

    @property
    def finite(self) -> bool:
        """Whether nothing is NaN or infinite, but for the gradient of an overflow."""
        return all(map(math.isfinite, self[:-2])) and (self.overflow or math.isfinite(self.grad_norm))


@dataclass
class Learner:
    """Policy and value model with their optimizer. Without a value model, the policy has a value head."""

    settings: Settings
    accelerator: Accelerator
    policy: Policy
    value_model: ValueModel | None

    def __post_init__(self) -> None:
        s, accelerator = self.settings, self.accelerator
        head = self.policy.value_head
        heads = [] if head is None else list(head.parameters())
        actor = [p for p in self.policy.parameters() if p.requires_grad and all(p is not other for other in heads)]
        critic = heads if self.value_model is None else [p for p in self.value_model.parameters() if p.requires_grad]
        self.trainable = [actor, critic]
        self.parameters = actor + critic
        optimizer = torch.optim.AdamW(
            [{"params": group} for group in self.trainable],
            lr=s.learning_rate,
            eps=s.adam_eps,
            weight_decay=s.weight_decay,
            fused=accelerator.device.type in {"cpu", "cuda"},
        )
        self.wrapped_policy, self.optimizer = accelerator.prepare(self.policy, optimizer)
        self.wrapped_value = None if self.value_model is None else accelerator.prepare(self.value_model)

    def set_learning_rates(self, policy: float, value: float) -> None:
        """Set the optimizer's two rates. There is no scheduler whose state could be lost."""
        for group, rate in zip(self.optimizer.param_groups, (policy, value), strict=True):
            group["lr"] = rate

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Training mode: dropout is 0 in both modes, but gradient checkpointing works in this one only."""
        both = nn.ModuleList([model for model in (self.policy, self.value_model) if model is not None])
        both.train()
        try:
            with adapt.configured_dropout_off(both):
                yield
        finally:
            self.optimizer.zero_grad()
            both.eval()

    def backward(self, experience: Experience, rows: Tensor, policy_learns: bool = True) -> Step:
        """Gradients of one minibatch, clipped.

        Losses are summed over the response tokens of the minibatch and divided by their number, over all
        micro-batches and processes, so that neither changes the gradient.
        """
        s, device = self.settings, self.accelerator.device
        tokens = self.total(experience.sequences.response_lengths[rows].sum())
        scale = self.accelerator.num_processes / tokens  # DDP averages gradients over the processes
        micro_batches = batching.micro_batches(experience.sequences.lengths[rows], s.micro_batch_tokens)
        parts = [experience.select(rows[micro]) for micro in micro_batches]
        ours, theirs, ratio_max = (torch.zeros(n, device=device) for n in (4, 2, 1))
        # First all of the policy, then all of the value model: processes exchange gradients in the same order, however
        # many micro-batches each of them has.
        for part in self._synchronised(self.wrapped_policy, parts):
            policy, value = self._policy_loss(part, scale) if policy_learns else (_unchanged(part.sequences.mask), None)
            ours += _stack(policy.loss, policy.approx_kl, policy.clipped, policy.ratio)
            ratio_max = torch.maximum(ratio_max, policy.ratio_max)
            if value is not None:
                theirs += _stack(value.loss, value.clipped)
        if self.wrapped_value is not None:
            for part in self._synchronised(self.wrapped_value, parts):
                value = self._value_model_loss(part, scale)
                theirs += _stack(value.loss, value.clipped)
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(self.parameters, s.max_grad_norm))
        means = self.total(torch.cat([ours, theirs])) / tokens
        largest = self.accelerator.gather(ratio_max).max()
        loss, approx_kl, clipped, ratio, value_loss, value_clipped, highest, grad_norm = torch.stack(
            [*means, largest, norm.to(largest)]
        ).tolist()
        scaler = self.accelerator.scaler
        overflow = scaler is not None and scaler.get_scale() > 1.0 and not math.isfinite(grad_norm)
        return Step(loss, value_loss, approx_kl, clipped, value_clipped, ratio, highest, grad_norm, overflow)

    def step(self) -> None:
        """Move the weights by the gradients, and forget these. In fp16 an overflow moves nothing."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        """Forget the gradients without a step."""
        self.optimizer.zero_grad()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # it counts what backward has unscaled

    def _policy_loss(self, part: Experience, scale: Tensor) -> tuple[core.PolicyLoss, core.ValueLoss | None]:
        """The objective of one micro-batch and its backward pass; a value head shares both."""
        s, mask = self.settings, part.sequences.mask
        with_entropy = s.entropy_coef > 0.0
        tokens = self.wrapped_policy(part.sequences, s.temperature, with_entropy)
        policy = core.policy_loss(unpack(tokens.logprobs, mask), part.logprobs, part.advantages, mask, s.clip_range)
        loss = policy.loss - (s.entropy_coef * tokens.entropies.sum() if with_entropy else 0.0)
        value = None
        if self.wrapped_value is None:
            value = self._value_loss(tokens.values, part)
            loss = loss + s.value_coef * value.loss
        self.accelerator.backward(loss * scale)
        return policy, value

    def _value_model_loss(self, part: Experience, scale: Tensor) -> core.ValueLoss:
        """The loss of a value model of its own on one micro-batch, and its backward pass."""
        assert self.wrapped_value is not None
        value = self._value_loss(self.wrapped_value(part.sequences), part)
        self.accelerator.backward(self.settings.value_coef * value.loss * scale)
        return value

    def _value_loss(self, values: Tensor, part: Experience) -> core.ValueLoss:
        mask = part.sequences.mask
        return core.value_loss(unpack(values, mask), part.values, part.returns, mask, self.settings.value_clip_range)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return tensor if self.accelerator.num_processes == 1 else self.accelerator.reduce(tensor, "sum")

    def _synchronised(self, model: Any, parts: Sequence[Experience]) -> Iterator[Experience]:
        """The micro-batches; gradients of a model are exchanged between the processes only at the last one."""
        for i, part in enumerate(parts):
            with nullcontext() if i + 1 == len(parts) else self.accelerator.no_sync(model):
                yield part


def _stack(*sums: Tensor) -> Tensor:
    return torch.stack([x.detach().float() for x in sums])


def _unchanged(mask: Tensor) -> core.PolicyLoss:
    """The policy's part while only the value model learns: every ratio is 1."""
    zero = torch.zeros((), device=mask.device)
    return core.PolicyLoss(zero, zero, zero, mask.sum(), torch.ones((), device=mask.device))
