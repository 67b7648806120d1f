"""The loop of PPO. ``Trainer.step`` is the algorithm; the rest is bookkeeping.

Several processes (accelerate) run the same code: each takes its share of an update's episodes, and every mean has
the tokens or episodes of all of them as denominator.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config.ppo_options import Settings
from rlhf.errors import RewardError, StoppedError, TrainingError
from rlhf.models import adapt, allocator
from rlhf.ppo import batching, core, state, summary, validation
from rlhf.ppo.batching import Prompts
from rlhf.ppo.checks import check_policy, check_settings
from rlhf.ppo.learner import Learner, Step
from rlhf.ppo.policy import Policy, ValueModel
from rlhf.ppo.rollout import Experience, Rollout, Scored, collect, per_token
from rlhf.ppo.sequences import Sequences
from rlhf.rewards import Rewards, Scorer
from rlhf.tracking.stopping import Stop
from rlhf.tracking.tracker import NullTracker, Tracker

log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """PPO of ``policy`` against ``rewards``, held near ``reference``.

    Args:
        settings: the options; ``rlhf.config.pipeline.Ppo``, a section of the pipeline's configuration, has them too.
        value_model: None where the policy has a value head (``settings.value_model`` says which of the two).
        checkpoints: where the state goes, and, when something is not finite, the batch. A training that finds its
            own checkpoints there goes on from them.
        reference: None is the policy as it is when training starts; with LoRA, its adapters off.
        start_from: the ``state`` of an earlier training of the same models: its weights, optimizer and controllers.
        held_out: prompts of the evaluations that ``settings.eval_every`` asks for.
        judges: scores by name that evaluations measure, and training never sees: over-optimisation shows in them.
        stop: once it is asked, training ends after the update that is under way.
    """

    settings: Settings
    policy: Policy
    value_model: ValueModel | None
    rewards: Rewards
    prompts: Prompts
    tokenizer: PreTrainedTokenizerBase
    checkpoints: Path
    reference: Policy | None = None
    start_from: Path | None = None
    held_out: Prompts | None = None
    judges: Mapping[str, Scorer] = field(default_factory=dict)
    seed: int = 0
    accelerator: Accelerator = field(default_factory=Accelerator)
    tracker: Tracker = field(default_factory=NullTracker)
    stop: Stop = field(default_factory=Stop)
    progress: state.Progress = field(init=False)
    learner: Learner = field(init=False)
    seconds: dict[str, float] = field(init=False, default_factory=dict)

    # ---------------------------------------------------------------------------------------------------- the algorithm
    def train(self) -> dict[str, float]:
        """Run all updates, from the last good checkpoint if there is one. Returns the final metrics.

        With evaluations, the policy is the best evaluated one afterwards.

        Raises:
            ConfigError: settings and models do not go together.
            RewardError: a reward failed; the batch is saved under ``checkpoints``.
            StoppedError: ``stop`` was asked, and a checkpoint is written.
            TrainingError: a score, loss or gradient is not finite; the batch is saved under ``checkpoints``.
        """
        self.prepare()
        self.restore()
        if self.progress.update == 0 and self.settings.eval_every:  # what the later evaluations are held against
            self.tracker.log(self.evaluate(0), step=0)
        for update in range(self.progress.update + 1, self.settings.updates + 1):
            self.record(self.step(update))
            if update % self.settings.checkpoint_every == 0 or update == self.settings.updates:
                self.save()
            self.end_if_asked()
        self.take_best()
        return summary.finals(self.progress, self.settings, self.best_metric)

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
        metrics = self.finish(update, rollout, scored, experience, steps)
        return metrics | self.evaluate(update)

    def rollout(self, update: int) -> Rollout:
        """Sample a response to each of this process's prompts of the update."""
        s, mine = self.settings, slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        rows = batching.prompt_rows(self.seed, update, s.episodes, len(self.prompts))[mine]
        generator = batching.generator(self.seed, "sample", update)
        uniforms = torch.rand(s.episodes, s.max_new_tokens, generator=generator)[mine]
        with self.accelerator.autocast():
            rollout = collect(
                self.policy,
                self.tokenizer,
                self.prompts.select(rows),
                uniforms,
                s.temperature,
                self.device,
                s.generation,
                s.generation_batch,
            )
            missing = self.policy.value_head is not None and rollout.values is None
            if self.accelerator.mixed_precision != "no" or not self.policy.in_float32 or missing:
                # In low precision, a forward over whole rows gives other numbers than decoding did, and the first
                # ratio would not be 1: take the old log-probabilities as the update will compute the new ones.
                with self.learner.learning():
                    planes = per_token(self._logprobs_and_values, rollout.sequences, s.micro_batch_tokens)
                rollout = rollout._replace(logprobs=planes[0], values=planes[1] if len(planes) > 1 else None)
        if not self.finite(rollout.logprobs[rollout.sequences.mask]):
            self.fail(update, "log-probability", rollout=rollout._asdict())
        return rollout

    def score(self, rollout: Rollout, update: int) -> Scored:
        """Ask the rewards, the reference and the value model."""
        s, sequences, reference = self.settings, rollout.sequences, self.reference
        assert reference is not None  # prepare
        tokens = s.micro_batch_tokens * (4 if self.device.type == "cuda" else 1)  # no gradients: less memory a token
        with self.accelerator.autocast(), torch.no_grad():
            raw, components = self.ask_rewards(rollout, update)
            ref_logprobs = per_token(lambda part: reference(part, s.temperature).logprobs, sequences, tokens)
            values = rollout.values if self.value_model is None else per_token(self.value_model, sequences, tokens)
        assert values is not None  # prepare: there is a value model or a value head
        std = 1.0
        if s.scale_scores:
            self.progress.scores = self.progress.scores.joined_by(raw, self.total)
            std = self.progress.scores.std
        scores = core.episode_scores(raw / std, rollout.ended, s.score_clip, s.missing_eos, s.missing_eos_value)
        scored = Scored(raw, scores, components, ref_logprobs, values)
        both = torch.stack([raw, scores])  # clipping and missing_eos may hide what is not finite
        for name, tensor in (("score", both), ("reference", ref_logprobs), ("value", values)):
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
        self.learner.set_learning_rates(*self.learning_rates(update))
        steps: list[Step] = []
        with self.learner.learning():
            for _ in range(s.epochs):
                for rows in torch.randperm(count, generator=shuffle).chunk(s.minibatches):
                    rows = rows.to(self.device)
                    steps.append(self.learner.backward(experience, rows, policy_learns=update > s.warmup_updates))
                    if not steps[-1].finite:
                        self.fail(update, "loss or gradient", experience=experience._asdict(), rows=rows)
                    if s.early_stop_kl is not None and steps[-1].approx_kl > 1.5 * s.early_stop_kl:
                        self.learner.discard()  # this last one is looked at, not taken
                        return steps
                    self.learner.step()
        assert len(steps) == s.epochs * s.minibatches
        return steps

    def evaluate(self, update: int) -> dict[str, float]:
        """Every ``eval_every`` updates: metrics on held-out prompts, and the policy kept if it is the best so far."""
        s, progress = self.settings, self.progress
        if not s.eval_every or (update % s.eval_every and update != s.updates):
            return {}
        assert self.held_out is not None  # prepare
        assert self.reference is not None
        batching.reseed(self.seed, update)  # a reward or judge may draw from the global generators
        asked = s, self.policy, self.reference, self.rewards, self.judges, self.held_out
        with self.timed("evaluate"), self.accelerator.autocast():
            try:
                columns = validation.measure(*asked, self.tokenizer, self.seed, self.accelerator)
            except (RewardError, TrainingError) as error:
                raise type(error)(f"ppo, evaluation after update {update}: {error}") from error
        metrics = progress.evaluated(update, columns, validation.planned(s))
        best = validation.better(metrics, update, s, self.best_metric, progress.best)
        if best is not None:
            progress.best = best
            if self.accelerator.is_main_process:
                state.save_best(self.checkpoints, self.policy, update)
        metrics = {f"ppo/eval/{name}": value for name, value in metrics.items()}
        return metrics | {"ppo/seconds/evaluate": self.seconds.pop("evaluate")}

    # ------------------------------------------------------------------------------------------------------ bookkeeping
    def prepare(self) -> None:
        """Put everything on its device, turn dropout off, and make the optimizer.

        Raises:
            ConfigError: settings and models do not go together.
        """
        s, accelerator = self.settings, self.accelerator
        check_settings(s, self.policy, self.value_model, accelerator.num_processes)
        if s.eval_every:
            validation.check(s, self.held_out, self.rewards, self.judges, accelerator.num_processes)
        if self.reference is None:
            self.reference = self.policy.as_reference()
        for model in (self.policy, self.value_model, self.reference):
            if model is not None:
                adapt.set_dropout_zero(model)
                adapt.fuse_gelu(model)
                model.to(self.device).eval()
        check_policy(self.policy, s.generation)
        if self.device.type == "cpu":
            allocator.keep_freed_memory()
        if not accelerator.is_main_process:
            self.tracker = NullTracker()
        self.learner = Learner(s, accelerator, self.policy, self.value_model)
        self.progress = state.Progress(kl_coef=s.kl_coef)

    @property
    def best_metric(self) -> str:
        """The metric by which the best policy is chosen."""
        return validation.best_metric(self.settings, self.judges)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return torch.device(self.accelerator.device)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.learner.total(tensor)

    def finite(self, tensor: Tensor) -> bool:
        """Whether all numbers are finite, in every process."""
        return bool(self.total((~torch.isfinite(tensor)).sum()).item() == 0)

    def ask_rewards(self, rollout: Rollout, update: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum (B,) of the rewards, and each component (B,).

        Raises:
            RewardError: one failed; the batch is saved.
        """
        try:
            raw, components = self.rewards(rollout.prompts.texts, rollout.responses, rollout.prompts.columns)
        except RewardError as error:
            path = self.keep_batch(update, rollout=rollout._asdict())
            raise RewardError(f"ppo update {update}: {error}. The batch is in {path} (torch.load)") from error
        return raw.to(self.device), components

    def learning_rates(self, update: int) -> tuple[float, float]:
        """Rates of policy and value model in an update: constant, or falling on a line from their peaks towards 0.

        The policy's is also scaled by what ``lr_target_kl`` has learnt.
        """
        s = self.settings
        share = 1.0 - (update - 1) / s.updates if s.schedule == "linear" else 1.0
        value = s.learning_rate if s.value_learning_rate is None else s.value_learning_rate
        return s.learning_rate * share * self.progress.lr_scale, value * share

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
        """An update's metrics, and what it leaves behind for the next ones: controllers and samples."""
        s, progress = self.settings, self.progress
        metrics = summary.metrics(rollout, scored, experience, steps, self.total)
        metrics |= summary.timings(self.seconds, self.total(rollout.sequences.response_lengths.sum()).item())
        metrics |= {"ppo/kl_coef": progress.kl_coef, "ppo/learning_rate": self.learning_rates(update)[0]}
        clipped = [step.grad_norm > s.max_grad_norm and not step.overflow for step in steps]
        metrics["ppo/grad_clip_fraction"] = summary.average(clipped)
        if self.accelerator.scaler is not None:
            metrics["ppo/loss_scale"] = self.accelerator.scaler.get_scale()
            metrics["ppo/overflows"] = float(sum(step.overflow for step in steps))
        progress.update = update
        if s.kl_control == "adaptive":
            kl = metrics["ppo/kl"]
            progress.kl_coef = core.next_kl_coef(progress.kl_coef, kl, s.kl_target, s.episodes, s.kl_horizon)
        if s.lr_target_kl is not None and update > s.warmup_updates:
            progress.lr_scale = core.next_lr_scale(progress.lr_scale, metrics["ppo/approx_kl"], s.lr_target_kl)
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
        self.progress.saved = self.progress.update
        if self.accelerator.is_main_process:
            state.save(self.checkpoints, self.learner, self.progress, self.tracker.mark())
        self.accelerator.wait_for_everyone()

    def end_if_asked(self) -> None:
        """Leave a checkpoint and end, if any process has been asked to and there is more to do.

        Raises:
            StoppedError: it is so.
        """
        update, updates = self.progress.update, self.settings.updates
        asked = self.total(torch.tensor(float(self.stop.asked), device=self.device)).item() > 0
        if asked and update < updates:
            if self.progress.saved < update:
                self.save()
            raise StoppedError(f"ppo: ended after update {update} of {updates}, as asked")

    def restore(self) -> None:
        """Take up the newest good checkpoint, if there is one, else what ``start_from`` names."""
        found = state.restore(self.checkpoints, self.learner)
        if found is None and self.start_from is not None:
            self.progress = state.load(self.start_from, self.learner)
        self.accelerator.wait_for_everyone()
        if found is not None:
            self.progress, mark = found
            self.tracker.rewind(mark)
        if self.accelerator.is_main_process:
            state.drop_damaged(self.checkpoints, self.progress.best)

    def take_best(self) -> None:
        """Give the policy the weights of the best evaluation, if there was one within the KL budget."""
        self.accelerator.wait_for_everyone()
        if self.progress.best is not None:
            validation.warn_if_no_better(self.progress.evaluations, self.best_metric, self.progress.best)
            state.load_best(self.checkpoints, self.policy, self.progress.best)
        elif self.settings.kl_budget is not None:
            log.warning("no evaluation was within ppo.kl_budget %g: the last policy is kept", self.settings.kl_budget)

    def keep_batch(self, update: int, **batch: Any) -> Path:
        """Save a batch for inspection."""
        path = self.checkpoints / f"failed-update-{update}-process-{self.accelerator.process_index}.pt"
        state.save_batch(path, batch)
        return path

    def fail(self, update: int, what: str, **batch: Any) -> None:
        """Save the batch for inspection and stop.

        Raises:
            TrainingError: always.
        """
        path, saved = self.keep_batch(update, **batch), self.progress.saved
        kept = f"the last good checkpoint, of update {saved}, is kept" if saved else "there is no checkpoint yet"
        raise TrainingError(
            f"ppo update {update}: a {what} is not finite. The batch is in {path} (torch.load); {kept}. Lower "
            "ppo.learning_rate or ppo.max_grad_norm, or look at the reward of that batch"
        )

    def _logprobs_and_values(self, part: Sequences) -> Tensor:
        """Packed, (1, N), or (2, N) where the policy has a value head.

        With a graph that nobody uses: attention has other kernels where there is none.
        """
        with torch.enable_grad():
            found = self.policy(part, self.settings.temperature)
        planes = [found.logprobs] if found.values is None else [found.logprobs, found.values]
        return torch.stack([plane.detach() for plane in planes])
