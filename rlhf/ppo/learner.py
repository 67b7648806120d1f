"""Optimizer steps: the gradients of one minibatch, taken in micro-batches, and what there is to say about them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf import models
from rlhf.ppo import batching, core
from rlhf.ppo.policy import Policy, ValueModel
from rlhf.ppo.rollout import Experience
from rlhf.ppo.sequences import unpack
from rlhf.ppo.settings import Settings


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
            with models.configured_dropout_off(both):
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
        sums, ratio_max = torch.zeros(6, device=device), torch.zeros((), device=device)
        micro_batches = batching.micro_batches(experience.sequences.lengths[rows], s.micro_batch_tokens)
        for i, micro in enumerate(micro_batches):
            part = experience.select(rows[micro])
            with self._synchronised(i + 1 == len(micro_batches)):
                policy, value = self._losses(part, scale, policy_learns)
            ratio_max = torch.maximum(ratio_max, policy.ratio_max)
            parts = (policy.loss, value.loss, policy.approx_kl, policy.clipped, value.clipped, policy.ratio)
            sums += torch.stack([x.detach().to(sums.dtype) for x in parts])
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(self.parameters, s.max_grad_norm))
        largest = self.accelerator.gather(ratio_max).max()
        numbers = torch.stack([*(self.total(sums) / tokens), largest, norm.to(largest)]).tolist()
        scaler = self.accelerator.scaler
        overflow = scaler is not None and scaler.get_scale() > 1.0 and not math.isfinite(numbers[-1])
        return Step(*numbers, overflow)  # type: ignore[call-arg]

    def step(self) -> None:
        """Move the weights by the gradients, and forget these. In fp16 an overflow moves nothing."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _losses(self, part: Experience, scale: Tensor, policy_learns: bool) -> tuple[core.PolicyLoss, core.ValueLoss]:
        """Both losses of one micro-batch and their backward passes.

        A value model of its own has a graph of its own, and the two are never in memory at once; a value head shares
        the policy's forward and backward pass.
        """
        s, mask = self.settings, part.sequences.mask
        policy, value = _unchanged(mask), None
        if policy_learns:
            with_entropy = s.entropy_coef > 0.0
            tokens = self.wrapped_policy(part.sequences, s.temperature, with_entropy)
            policy = core.policy_loss(unpack(tokens.logprobs, mask), part.logprobs, part.advantages, mask, s.clip_range)
            loss = policy.loss - (s.entropy_coef * tokens.entropies.sum() if with_entropy else 0.0)
            if self.wrapped_value is None:
                value = self._value_loss(tokens.values, part)
                loss = loss + s.value_coef * value.loss
            self.accelerator.backward(loss * scale)
        if self.wrapped_value is not None:
            value = self._value_loss(self.wrapped_value(part.sequences), part)
            self.accelerator.backward(s.value_coef * value.loss * scale)
        assert value is not None  # settings: a policy that does not learn has a value model that does
        return policy, value

    def _value_loss(self, values: Tensor, part: Experience) -> core.ValueLoss:
        mask = part.sequences.mask
        return core.value_loss(unpack(values, mask), part.values, part.returns, mask, self.settings.value_clip_range)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return tensor if self.accelerator.num_processes == 1 else self.accelerator.reduce(tensor, "sum")

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Within it, backward passes exchange gradients between the processes only at a minibatch's last one."""
        value = self.wrapped_value
        none = nullcontext()
        with (
            none if last else self.accelerator.no_sync(self.wrapped_policy),
            none if last or value is None else self.accelerator.no_sync(value),
        ):
            yield


def _unchanged(mask: Tensor) -> core.PolicyLoss:
    """The policy's part while only the value model learns: every ratio is 1."""
    zero = torch.zeros((), device=mask.device)
    return core.PolicyLoss(zero, zero, zero, mask.sum(), torch.ones((), device=mask.device))
