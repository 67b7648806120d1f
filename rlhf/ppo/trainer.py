"""The loop of PPO. ``Trainer.step`` is the algorithm; the rest is bookkeeping.

Several processes (accelerate) run the same code: each takes its share of an update's episodes, and every mean has
the tokens or episodes of all of them as denominator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.errors import ConfigError, TrainingError
from rlhf.ppo import batching, core, state, summary
from rlhf.ppo.batching import Prompts
from rlhf.ppo.policy import CausalPolicy, ValueModel, unpack
from rlhf.ppo.rollout import Experience, Rollout, Scored, collect, per_token
from rlhf.ppo.summary import Step
from rlhf.rewards import Rewards

if TYPE_CHECKING:
    from rlhf.config import Ppo
    from rlhf.tracker import Tracker


@dataclass
class Trainer:
    """PPO of ``policy`` against ``rewards``, held near ``reference``.

    ``settings`` is the section ``ppo`` of the configuration, or anything with its attributes. Without a
    ``reference`` it is the policy with its LoRA adapter off. ``checkpoints`` is where the state goes, and, when
    something is not finite, the batch. Dropout must be off in all models (``models.set_dropout_zero``).
    """

    settings: Ppo
    policy: CausalPolicy
    value_model: ValueModel
    rewards: Rewards
    prompts: Prompts
    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator
    tracker: Tracker
    checkpoints: Path
    seed: int
    reference: CausalPolicy | None = None
    progress: state.Progress = field(init=False)
    seconds: dict[str, float] = field(init=False, default_factory=dict)

    # ---------------------------------------------------------------------------------------------------- the algorithm
    def train(self) -> dict[str, float]:
        """Run all updates, from the last good checkpoint if there is one. Returns the final metrics.

        Raises:
            TrainingError: a score, loss or gradient is not finite; the batch is saved under ``checkpoints``.
            RewardError: a reward function failed.
        """
        self.prepare()
        self.restore()
        for update in range(self.progress.update + 1, self.settings.updates + 1):
            self.record(self.step(update))
            if update % self.settings.checkpoint_every == 0 or update == self.settings.updates:
                self.save()
        return summary.finals(self.progress, self.settings)

    def step(self, update: int) -> dict[str, float]:
        """One update, numbered from 1: sample, score, estimate advantages, optimise. Returns its metrics."""
        batching.reseed(self.seed, update)
        with self.timed("rollout"):
            rollout = self.rollout(update)
        with self.timed("score"):
            scored = self.score(rollout, update)
        with self.timed("optimise"):
            experience = self.advantages(rollout, scored)
            steps = self.optimise(experience, update)
        return self.finish(update, rollout, scored, experience, steps)

    def rollout(self, update: int) -> Rollout:
        """Sample a response to each of this process's prompts of the update."""
        s, mine = self.settings, slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        rows = batching.prompt_rows(self.seed, update, s.episodes, len(self.prompts))[mine]
        generator = batching.generator(self.seed, "sample", update)
        uniforms = torch.rand(s.episodes, s.max_new_tokens, generator=generator)[mine]
        with self.accelerator.autocast():
            rollout = collect(
                self.policy, self.tokenizer, self.prompts.select(rows), uniforms, s.temperature, self.device
            )
            if self.accelerator.mixed_precision == "no":
                return rollout
            # In low precision, a forward over whole rows gives other numbers than decoding did, and the first
            # ratio would not be 1: take the old log-probabilities as the update will compute the new ones.
            logprobs = per_token(
                lambda part: self.policy(part, s.temperature).logprobs, rollout.sequences, s.micro_batch_tokens
            )
        return rollout._replace(logprobs=logprobs)

    def score(self, rollout: Rollout, update: int) -> Scored:
        """Ask the rewards, the reference and the value model."""
        s, sequences = self.settings, rollout.sequences
        tokens = s.micro_batch_tokens * (4 if self.device.type == "cuda" else 1)  # no gradients: less memory a token
        with self.accelerator.autocast(), torch.no_grad():
            raw, components = self.rewards(rollout.prompts.texts, rollout.responses, rollout.prompts.columns)
            raw = raw.to(self.device)
            with self.policy.without_adapter() if self.reference is None else nullcontext():
                reference = self.reference or self.policy
                ref_logprobs = per_token(lambda part: reference(part, s.temperature).logprobs, sequences, tokens)
            values = per_token(self.value_model, sequences, tokens)
        scores = core.episode_scores(raw, rollout.ended, s.score_clip, s.missing_eos, s.missing_eos_value)
        scored = Scored(raw, scores, components, ref_logprobs, values)
        for name, tensor in (("score", scores), ("reference", ref_logprobs), ("value", values)):
            if not self.finite(tensor):
                self.fail(update, name, rollout=rollout._asdict(), scored=scored._asdict())
        return scored

    def advantages(self, rollout: Rollout, scored: Scored) -> Experience:
        """Per-token rewards, and advantages and returns from them. The advantages are not whitened yet."""
        s, mask = self.settings, rollout.sequences.mask
        kl = core.kl_per_token(rollout.logprobs, scored.ref_logprobs, mask, s.kl_estimator)
        rewards = core.token_rewards(scored.scores, kl, mask, self.progress.kl_coef)
        shaped = core.whiten(rewards, mask, keep_mean=True, total=self.total) if s.whiten_rewards else rewards
        advantages, returns = core.generalized_advantages(shaped, scored.values, mask, s.gamma, s.lam)
        return Experience(rollout.sequences, rollout.logprobs, scored.values, rewards, advantages, returns)

    def optimise(self, experience: Experience, update: int) -> list[Step]:
        """Take epochs * minibatches optimizer steps, fewer if ``early_stop_kl`` ends them."""
        s, count = self.settings, len(experience.logprobs)
        if s.whiten_advantages:
            mask = experience.sequences.mask
            whitened = core.whiten(experience.advantages, mask, total=self.total)
            experience = experience._replace(advantages=whitened)
        shuffle = batching.generator(self.seed, "shuffle", update, self.accelerator.process_index)
        self.set_learning_rates(update)
        self.policy.train()  # dropout is 0; gradient checkpointing works in training mode only
        self.value_model.train()
        steps: list[Step] = []
        try:
            for _ in range(s.epochs):
                for rows in torch.randperm(count, generator=shuffle).chunk(s.minibatches):
                    steps.append(self.backward(experience, rows.to(self.device), update))
                    if s.early_stop_kl is not None and steps[-1].approx_kl > 1.5 * s.early_stop_kl:
                        return steps  # this last one is looked at, not taken
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        finally:
            self.optimizer.zero_grad()
            self.policy.eval()
            self.value_model.eval()
        assert len(steps) == s.epochs * s.minibatches
        return steps

    def backward(self, experience: Experience, rows: Tensor, update: int) -> Step:
        """Gradients of one minibatch, clipped, and what there is to say about it.

        Losses are summed over the response tokens of the minibatch and divided by their number, over all
        micro-batches and processes, so that neither changes the gradient.
        """
        s, learns = self.settings, update > self.settings.warmup_updates
        tokens = self.total(experience.sequences.response_lengths[rows].sum())
        scale = self.accelerator.num_processes / tokens  # DDP averages gradients over the processes
        sums, ratio_max = torch.zeros(6, device=self.device), torch.zeros((), device=self.device)
        micro_batches = batching.micro_batches(experience.sequences.lengths[rows], s.micro_batch_tokens)
        for i, micro in enumerate(micro_batches):
            part = experience.select(rows[micro])
            with self.synchronised(i + 1 == len(micro_batches)):
                policy = self.policy_loss(part, scale) if learns else summary.unchanged(part.sequences.mask)
                ratio_max = torch.maximum(ratio_max, policy.ratio_max)
                value = self.value_loss(part, scale)
            parts = (policy.loss, value.loss, policy.approx_kl, policy.clipped, value.clipped, policy.ratio)
            sums += torch.stack([x.detach().to(sums.dtype) for x in parts])
        norm = self.accelerator.clip_grad_norm_(self.parameters, s.max_grad_norm)
        largest = self.accelerator.gather(ratio_max).max()
        step = Step(*torch.stack([*(self.total(sums) / tokens), largest, torch.as_tensor(norm).to(largest)]).tolist())
        if not all(map(math.isfinite, step)):
            self.fail(update, "loss or gradient", experience=experience._asdict(), rows=rows)
        return step

    def policy_loss(self, part: Experience, scale: Tensor) -> core.PolicyLoss:
        """The clipped objective of one micro-batch, and its backward pass."""
        s, mask = self.settings, part.sequences.mask
        with_entropy = s.entropy_coef > 0.0
        tokens = self.wrapped_policy(part.sequences, s.temperature, with_entropy)
        result = core.policy_loss(unpack(tokens.logprobs, mask), part.logprobs, part.advantages, mask, s.clip_range)
        bonus = s.entropy_coef * tokens.entropies.sum() if with_entropy else 0.0
        self.accelerator.backward((result.loss - bonus) * scale)
        return result

    def value_loss(self, part: Experience, scale: Tensor) -> core.ValueLoss:
        """The value loss of one micro-batch, and its backward pass: two graphs, never both in memory."""
        s, mask = self.settings, part.sequences.mask
        values = unpack(self.wrapped_value(part.sequences), mask)
        result = core.value_loss(values, part.values, part.returns, mask, s.value_clip_range)
        self.accelerator.backward(s.value_coef * result.loss * scale)
        return result

    # ------------------------------------------------------------------------------------------------------ bookkeeping
    def prepare(self) -> None:
        """Put everything on its device and make the optimizer.

        Raises:
            ConfigError: the episodes do not divide into the processes and minibatches.
        """
        s, accelerator = self.settings, self.accelerator
        shares = accelerator.num_processes * s.minibatches
        if s.episodes % shares:
            raise ConfigError(
                f"ppo.episodes {s.episodes} must be a multiple of processes * minibatches = "
                f"{accelerator.num_processes} * {s.minibatches}"
            )
        for model in (self.policy, self.value_model, self.reference):
            if model is not None:
                model.to(self.device).eval()
        self.trainable = [[p for p in m.parameters() if p.requires_grad] for m in (self.policy, self.value_model)]
        self.parameters = [p for group in self.trainable for p in group]
        optimizer = torch.optim.AdamW(
            [{"params": group} for group in self.trainable],
            lr=s.learning_rate,
            eps=s.adam_eps,
            weight_decay=s.weight_decay,
            fused=self.device.type in {"cpu", "cuda"},
        )
        self.wrapped_policy, self.wrapped_value, self.optimizer = accelerator.prepare(
            self.policy, self.value_model, optimizer
        )
        self.progress = state.Progress(kl_coef=s.kl_coef)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return torch.device(self.accelerator.device)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return tensor if self.accelerator.num_processes == 1 else self.accelerator.reduce(tensor, "sum")

    def finite(self, tensor: Tensor) -> bool:
        """Whether all numbers are finite, in every process."""
        return bool(self.total((~torch.isfinite(tensor)).sum()).item() == 0)

    def learning_rate(self, update: int, peak: float | None = None) -> float:
        """The policy's learning rate in an update: constant, or falling on a line from its peak towards 0."""
        s = self.settings
        share = 1.0 - (update - 1) / s.updates if s.schedule == "linear" else 1.0
        return (s.learning_rate if peak is None else peak) * share

    def set_learning_rates(self, update: int) -> None:
        """Set the optimizer's two rates. There is no scheduler whose state could be lost."""
        peaks = (self.settings.learning_rate, self.settings.value_learning_rate)
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            group["lr"] = self.learning_rate(update, peak)

    @contextmanager
    def synchronised(self, last: bool) -> Iterator[None]:
        """Within it, backward passes exchange gradients between the processes only at a minibatch's last one."""
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.wrapped_policy), self.accelerator.no_sync(self.wrapped_value):
                yield

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Note how many seconds a part of the update takes."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[part] = time.perf_counter() - start

    def finish(
        self, update: int, rollout: Rollout, scored: Scored, experience: Experience, steps: list[Step]
    ) -> dict[str, float]:
        """An update's metrics, and what it leaves behind for the next ones: the KL coefficient, the samples."""
        s, progress = self.settings, self.progress
        metrics = summary.metrics(rollout, scored, experience, steps, self.total)
        metrics |= summary.timings(self.seconds, self.total(rollout.sequences.response_lengths.sum()).item())
        metrics |= {"ppo/kl_coef": progress.kl_coef, "ppo/learning_rate": self.learning_rate(update)}
        metrics["ppo/grad_clip_fraction"] = summary.average([step.grad_norm > s.max_grad_norm for step in steps])
        progress.update = update
        if s.kl_control == "adaptive":
            progress.kl_coef = core.next_kl_coef(
                progress.kl_coef, metrics["ppo/kl"], s.kl_target, s.episodes, s.kl_horizon
            )
        if update % s.log_samples_every == 0 or update == s.updates:
            progress.samples += summary.samples(update, rollout, scored)
        return metrics

    def record(self, metrics: dict[str, float]) -> None:
        """Send an update's metrics to the tracker."""
        progress = self.progress
        progress.remember(metrics)
        self.tracker.log(metrics, step=progress.update)
        self.tracker.progress(
            progress.update,
            self.settings.updates,
            reward=metrics["ppo/reward_mean"],
            kl=metrics["ppo/kl"],
            tokens_per_s=metrics["ppo/tokens_per_second"],
        )

    def save(self) -> None:
        """Write a checkpoint from which ``restore`` goes on exactly."""
        if self.accelerator.is_main_process:
            state.save(
                self.checkpoints, self.policy, self.value_model, self.optimizer, self.progress, self.tracker.mark()
            )
        self.accelerator.wait_for_everyone()

    def restore(self) -> None:
        """Take up the newest good checkpoint, if there is one."""
        found = state.restore(self.checkpoints, self.policy, self.value_model, self.optimizer)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state.drop_damaged(self.checkpoints)
        if found is not None:
            self.progress, mark = found
            self.tracker.rewind(mark)

    def fail(self, update: int, what: str, **batch: Any) -> None:
        """Save the batch for inspection and stop.

        Raises:
            TrainingError: always.
        """
        path = self.checkpoints / f"failed-update-{update}-process-{self.accelerator.process_index}.pt"
        state.save_batch(path, batch)
        raise TrainingError(
            f"ppo update {update}: a {what} is not finite. The batch is in {path} (torch.load), and the last good "
            f"checkpoint, of update {self.progress.saved}, is kept. Lower ppo.learning_rate or ppo.max_grad_norm, or "
            "look at the reward of that batch"
        )
