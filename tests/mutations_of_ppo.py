"""Ways to break the PPO engine, and the tests that must notice: see ``tests/mutations.py``."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One way to break the code, and who must notice."""

    point: str  # of docs/ppo.md, "What holds, and how we know"
    what: str
    file: str  # below rlhf/
    old: str  # is there once
    new: str
    tests: str  # arguments of pytest, below tests/rlhf/ppo/


MUTATIONS = [
    # --- 1: the first step has ratio 1
    Mutation(
        "1", "the update takes log-probabilities at temperature 1", "ppo/learner.py",
        "self.wrapped_policy(part.sequences, s.temperature, with_entropy)",
        "self.wrapped_policy(part.sequences, 1.0, with_entropy)",
        "test_invariants.py -k starts_at_ratio_one",
    ),
    Mutation(
        "1", "sampling ignores the temperature", "ppo/generation.py",
        "policy.logits(hidden, drawing.temperature)", "policy.logits(hidden, 1.0)",
        "test_invariants.py -k starts_at_ratio_one",
    ),
    Mutation(
        "1", "dropout that a configuration names stays on", "models/adapt.py",
        "vars(config).update(dict.fromkeys(names, 0.0))", "pass",
        "test_invariants.py -k starts_at_ratio_one",
    ),
    Mutation(
        "1", "dropout modules stay on", "models/adapt.py", "module.p = 0.0", "pass",
        "test_invariants.py -k starts_at_ratio_one",
    ),
    Mutation(
        "1", "low precision: old log-probabilities from kernels without gradients", "ppo/trainer.py",
        "with torch.enable_grad():", "with torch.no_grad():",
        "test_invariants.py -k low_precision_too",
    ),
    Mutation(
        "1", "low precision: old log-probabilities from decoding", "ppo/trainer.py",
        'self.accelerator.mixed_precision != "no"', "False",
        "test_invariants.py -k low_precision_too",
    ),
    Mutation(
        "1", "weights in bf16: old log-probabilities from decoding", "ppo/trainer.py",
        "not self.policy.in_float32", "False",
        "test_invariants.py -k frozen_weights_in_bf16",
    ),
    # --- 2: gradients depend on neither micro-batches, padding nor processes
    Mutation(
        "2", "each micro-batch is divided by its own tokens", "ppo/learner.py",
        "self._policy_loss(part, scale) if policy_learns",
        "self._policy_loss(part, 1.0 / part.sequences.response_lengths.sum()) if policy_learns",
        "test_invariants.py -k micro_batches",
    ),
    Mutation(
        "2", "rows of a micro-batch are taken for rows of the rollout", "ppo/learner.py",
        "experience.select(rows[micro])", "experience.select(micro)",
        "test_invariants.py -k one_plain_loss",
    ),
    Mutation(
        "2", "the entropy bonus has the wrong sign", "ppo/learner.py",
        "policy.loss - (s.entropy_coef", "policy.loss + (s.entropy_coef",
        "test_invariants.py -k one_plain_loss",
    ),
    Mutation(
        "2", "value_coef left out for a value model of its own", "ppo/learner.py",
        "backward(self.settings.value_coef * value.loss * scale)", "backward(value.loss * scale)",
        "test_invariants.py -k one_plain_loss",
    ),
    Mutation(
        "2", "value_coef left out for a value head", "ppo/learner.py",
        "loss = loss + s.value_coef * value.loss", "loss = loss + value.loss",
        "test_invariants.py -k one_plain_loss",
    ),
    Mutation(
        "2", "gradients are not zeroed between steps", "ppo/learner.py",
        "        self.optimizer.step()\n        self.optimizer.zero_grad()", "        self.optimizer.step()",
        "test_invariants.py -k plain_loop",
    ),
    Mutation(
        "2", "an encoder does not mask its padding", "ppo/policy.py",
        "_filled(sequences.prompts, seen), attention_mask=seen)", "_filled(sequences.prompts, seen))",
        "test_invariants.py test_policy.py -k 'micro_batches or plain_forward'",
    ),
    Mutation(
        "2", "a decoder attends to the prompts' padding", "ppo/policy.py",
        "            encoder_attention_mask=seen,\n", "",
        "test_invariants.py test_policy.py -k 'micro_batches or plain_forward'",
    ),
    Mutation(
        "2", "no factor for the average that DDP takes", "ppo/learner.py",
        "self.accelerator.num_processes / tokens", "1.0 / tokens",
        "test_processes.py",
    ),
    Mutation(
        "2", "whitening over one process's tokens", "ppo/trainer.py",
        "core.whiten(experience.advantages, mask, total=self.total)", "core.whiten(experience.advantages, mask)",
        "test_processes.py",
    ),
    Mutation(
        "2", "scores scaled by one process's deviation", "ppo/trainer.py",
        "joined_by(raw, self.total)", "joined_by(raw)",
        "test_processes.py",
    ),
    Mutation(
        "2", "micro-batches over the token budget", "ppo/batching.py",
        "budget // ordered[start]", "2 * budget // ordered[start]",
        "test_batching.py",
    ),
    # --- 3: masked positions may hold anything
    Mutation(
        "3", "a product with the mask in place of a choice", "ppo/core.py",
        "return torch.where(mask, x, 0.0)", "return x * mask",
        "test_invariants.py test_core.py -k 'masked or loop'",
    ),
    Mutation(
        "3", "padding ids of a response are looked up", "ppo/policy.py",
        "return ids.masked_fill(~mask, 0)", "return ids",
        "test_invariants.py -k 'padding or masked'",
    ),
    # --- 4: pad == eos
    Mutation(
        "4", "lengths counted as tokens that are not pad", "ppo/rollout.py",
        "generated.responses, generated.lengths)\n    tokens",
        "generated.responses, (generated.responses != tokenizer.pad_token_id).sum(1).clamp_min(1))\n    tokens",
        "test_invariants.py -k pad_equal",
    ),
    # --- 5: the formulas
    Mutation("5", "GAE without lambda", "ppo/core.py", "gamma * lam * advantage", "gamma * advantage", "test_core.py"),
    Mutation(
        "5", "GAE with V_t in place of V_{t+1}", "ppo/core.py",
        "following = F.pad(values[:, 1:], (0, 1))", "following = values",
        "test_core.py",
    ),
    Mutation("5", "variance over N - 1", "ppo/core.py", ".square().sum()) / count", ".square().sum()) / (count - 1)",
             "test_core.py"),
    Mutation("5", "the larger objective", "ppo/core.py", "torch.maximum(plain, clipped).sum(),\n        approx_kl",
             "torch.minimum(plain, clipped).sum(),\n        approx_kl", "test_core.py"),
    Mutation("5", "the smaller value loss", "ppo/core.py", "0.5 * torch.maximum(plain, clipped)",
             "0.5 * torch.minimum(plain, clipped)", "test_core.py"),
    Mutation("5", "values are not clipped", "ppo/core.py",
             "near = values.clamp(old_values - clip_range, old_values + clip_range)", "near = values", "test_core.py"),
    Mutation("5", "k3 with the wrong sign", "ppo/core.py", "torch.expm1(-d) + d", "torch.expm1(d) - d", "test_core.py"),
    Mutation("5", "the score on the last column", "ppo/core.py", "last = mask.sum(1, keepdim=True) - 1",
             "last = torch.full_like(mask.sum(1, keepdim=True), mask.shape[1] - 1)", "test_core.py"),
    Mutation("5", "the KL controller without its clip", "ppo/core.py",
             "error = min(max(kl / target - 1.0, -0.2), 0.2)", "error = kl / target - 1.0", "test_core.py"),
    Mutation("5", "the learning rate goes the wrong way", "ppo/core.py", "if approx_kl > 2.0 * target:",
             "if approx_kl < 2.0 * target:", "test_core.py"),
    Mutation("5", "running deviations without the part between batches", "ppo/core.py",
             "variance * number + between", "variance * number", "test_core.py"),
    Mutation("5", "the token's own gradient left out", "ppo/core.py",
             "table.scatter_add_(1, tokens, gradient[:, None])", "table", "test_core.py"),
    # --- 6: log-probabilities of sampled tokens
    Mutation(
        "6", "positions count the padding", "ppo/decoding.py",
        "(mask.cumsum(1) - 1).clamp_min(0)", "torch.arange(mask.shape[1], device=mask.device).expand_as(mask)",
        "test_generation.py -k plain_forward",
    ),
    Mutation(
        "6", "the wrong rows go on when finished ones are dropped", "ppo/generation.py",
        "shrinking.keep(going.nonzero()[:, 0])", "shrinking.keep(torch.arange(int(going.sum())))",
        "test_generation.py -k 'plain_forward or alone'",
    ),
    Mutation(
        "6", "another row's random numbers", "ppo/generation.py",
        "self.uniforms[rows, t]", "self.uniforms[rows.flip(0), t]",
        "test_generation.py -k alone",
    ),
    Mutation(
        "6", "responses do not end at end-of-sequence", "ppo/generation.py",
        "drawn.tokens == self.eos_token_id", "drawn.tokens < 0",
        "test_generation.py -k ends_at_its_first",
    ),
    Mutation(
        "6", "a static step does not see itself", "ppo/decoding.py",
        "        self._mask.index_fill_(3, self._column, True)\n", "",
        "test_generation.py -k plain_forward",
    ),
    Mutation(
        "6", "a static cache is not emptied", "ppo/decoding.py", "self._cache.reset()", "pass",
        "test_generation.py -k serves_the_next",
    ),
    Mutation(
        "6", "a cache forgets what is new", "ppo/decoding.py",
        "buffer[:, :, start : self._length] = states", "buffer[:, :, start : self._length] = 0.0",
        "test_generation.py -k plain_forward",
    ),
    Mutation(
        "6", "decoding attends to the encoder's padding", "ppo/decoding.py",
        "            encoder_attention_mask=self._seen,\n", "",
        "test_generation.py -k plain_forward",
    ),
    Mutation(
        "6", "the model's own generation settings count", "ppo/generation.py",
        "model.generation_config, GenerationConfig()", "model.generation_config, model.generation_config",
        "test_generation.py -k own_generation",
    ),
    Mutation(
        "6", "hidden states of the token itself", "ppo/sequences.py",
        "predicts = (column >= start - 1) & (column < end - 1)", "predicts = (column >= start) & (column < end)",
        "test_policy.py",
    ),
    Mutation(
        "6", "a decoder reads the token that it predicts", "ppo/policy.py",
        "return torch.cat([start, responses[:, :-1]], dim=1)", "return responses",
        "test_policy.py",
    ),
    Mutation(
        "6", "a static cache for attention that adds its mask", "ppo/decoding.py",
        'model.config._attn_implementation == "sdpa"', "True",
        "test_generation.py -k adds_its_mask",
    ),
    # --- 7: resuming
    Mutation(
        "7", "the optimizer is not restored", "ppo/state.py",
        "    _load_moments(learner.optimizer, path / OPTIMIZER)\n", "",
        "test_resume.py -k 'same_bits and gpt2'",
    ),
    Mutation(
        "7", "the KL coefficient is not restored", "ppo/state.py",
        '    progress = Progress(**record["progress"])',
        '    progress = Progress(**record["progress"])\n    progress.kl_coef = 0.05',
        "test_resume.py -k 'same_bits and gpt2'",
    ),
    Mutation(
        "7", "the running deviation is not restored", "ppo/state.py",
        "progress.scores = Running(*progress.scores)", "progress.scores = Running()",
        "test_resume.py -k 'same_bits and gpt2'",
    ),
    Mutation(
        "7", "the best evaluation is not restored", "ppo/state.py",
        "progress.best = None if progress.best is None else Best(*progress.best)", "progress.best = None",
        "test_validation.py -k resumed",
    ),
    Mutation(
        "7", "global generators are not reseeded", "ppo/trainer.py",
        "        batching.reseed(self.seed, update)\n", "",
        "test_resume.py -k 'same_bits and gpt2'",
    ),
    Mutation(
        "7", "the tracker is not rewound", "ppo/trainer.py", "self.tracker.rewind(mark)", "pass",
        "test_resume.py -k 'same_bits and gpt2'",
    ),
    Mutation(
        "7", "a checkpoint counts without its manifest", "store/checkpoints.py",
        "        if reason is None:\n            return path", "        return path",
        "test_resume.py -k damaged",
    ),
    # --- 8: the known optimum
    Mutation(
        "8", "half the KL penalty", "ppo/core.py", "_real(-kl_coef * kl, mask)", "_real(-0.5 * kl_coef * kl, mask)",
        "test_bandit.py -k gpt2-0-separate",
    ),
    Mutation(
        "8", "the reference at temperature 1", "ppo/trainer.py",
        "reference(part, s.temperature).logprobs", "reference(part, 1.0).logprobs",
        "test_bandit.py -k gpt2-0-separate",
    ),
    # --- 9: LoRA
    Mutation(
        "9", "the adapter stays on for the reference", "ppo/policy.py",
        "        with self._off():\n", "        with nullcontext():\n",
        "test_invariants.py test_policy.py -k 'lora or reference'",
    ),
    Mutation(
        "9", "biases of the base learn too", "models/adapt.py",
        "lora_dropout=0.0,", 'lora_dropout=0.0,\n        bias="all",',
        "test_invariants.py -k lora",
    ),
    # --- 10: combinations
    Mutation(
        "10", "a warm-up is accepted with a value head", "config/ppo_options.py",
        'if s.warmup_updates and s.value_model == "shared":', "if False:",
        "test_every_combination.py -k refused",
    ),
    Mutation(
        "10", "a value head does not learn", "ppo/learner.py",
        "loss = loss + s.value_coef * value.loss", "loss = loss + 0.0 * value.loss",
        "test_every_combination.py -k 'combination_trains and shared'",
    ),
    Mutation(
        "10", "models are not held against the settings", "ppo/checks.py",
        "if (policy.value_head is not None, value_model is None) != (shared, shared):", "if False:",
        "test_every_combination.py -k fit_the_settings",
    ),
    # --- 11: what is not finite
    Mutation(
        "11", "log-probabilities are not checked", "ppo/trainer.py",
        "if not self.finite(rollout.logprobs[rollout.sequences.mask]):", "if False:",
        "test_failures.py -k logits",
    ),
    Mutation(
        "11", "scores are not checked", "ppo/trainer.py", "if not self.finite(tensor):", "if False:",
        "test_failures.py -k nan_in_the_rewards",
    ),
    Mutation(
        "11", "scores are checked after they are clipped", "ppo/trainer.py",
        "torch.stack([raw, scores])", "torch.stack([scores, scores])",
        "test_failures.py -k before_anything_hides_it",
    ),
    Mutation(
        "11", "losses and gradients are not checked", "ppo/trainer.py", "if not steps[-1].finite:", "if False:",
        "test_failures.py -k 'gradients_that or loss_that'",
    ),
    Mutation(
        "11", "gradients are not clipped", "ppo/learner.py",
        "clip_grad_norm_(self.parameters, s.max_grad_norm)", "clip_grad_norm_(self.parameters, 1e30)",
        "test_failures.py -k large",
    ),
    Mutation(
        "11", "the batch of a failed reward is lost", "ppo/trainer.py",
        "path = self.keep_batch(update, rollout=rollout._asdict())", "path = self.checkpoints",
        "test_failures.py -k reward_function",
    ),
    Mutation(
        "11", "an overflow of fp16 is no excuse", "ppo/learner.py",
        "overflow = scaler is not None and", "overflow = False and scaler is not None and",
        "test_half_precision.py",
    ),
    Mutation(
        "11", "an early stop in fp16 leaves the scaler as it is", "ppo/learner.py",
        "            self.accelerator.scaler.update()", "            pass",
        "test_half_precision.py -k early",
    ),
    # --- options
    Mutation(
        "options", "a warm-up trains the policy too", "ppo/trainer.py",
        "policy_learns=update > s.warmup_updates", "policy_learns=True",
        "test_trainer.py -k warm_up",
    ),
    Mutation(
        "options", "early stop left out", "ppo/trainer.py", "> 1.5 * s.early_stop_kl:", "> 1e9:",
        "test_trainer.py -k early",
    ),
    Mutation(
        "options", "the value model's learning rate is scaled too", "ppo/trainer.py",
        "self.progress.lr_scale, value * share", "self.progress.lr_scale, value * share * self.progress.lr_scale",
        "test_trainer.py -k learning_rate",
    ),
    Mutation(
        "options", "scores are clipped before they are scaled", "ppo/trainer.py",
        "core.episode_scores(raw / std, rollout.ended, s.score_clip,",
        "core.episode_scores(raw.clamp(-(s.score_clip or 1e9), s.score_clip or 1e9) / std, rollout.ended, None,",
        "test_trainer.py -k running",
    ),
    Mutation(
        "options", "each update draws the same numbers", "ppo/trainer.py",
        'batching.generator(self.seed, "sample", update)', 'batching.generator(self.seed, "sample", 1)',
        "test_invariants.py -k draws_anew",
    ),
    Mutation(
        "options", "what a killed attempt kept as the best stays", "ppo/state.py",
        '    checkpoints.drop_after(directory / BEST,', '    (directory / BEST,',
        "test_validation.py -k kept_by_a_killed",
    ),
    # --- evaluations, judges, over-optimisation
    Mutation(
        "judges", "a standard error over n", "ppo/overoptimisation.py", "values.std(correction=1)",
        "values.std(correction=0)", "test_overoptimisation.py test_validation.py -k 'standard or numbers'",
    ),
    Mutation(
        "judges", "the many looks are not paid for", "ppo/overoptimisation.py",
        "evaluations * (evaluations - 1) // 2)", "1)",
        "test_overoptimisation.py -k 'quantile or hand or seldom'",
    ),
    Mutation(
        "judges", "a normal quantile in place of Student's", "ppo/overoptimisation.py",
        "stdtrit(prompts - 1, ", "stdtrit(10**9, ",
        "test_overoptimisation.py -k quantile",
    ),
    Mutation(
        "judges", "an alarm although the proxy has not risen", "ppo/overoptimisation.py",
        "for change in (rise, fall))", "for change in (fall,))",
        "test_overoptimisation.py -k hand",
    ),
    Mutation(
        "judges", "an alarm although the judge has not fallen", "ppo/overoptimisation.py",
        "for change in (rise, fall))", "for change in (rise,))",
        "test_overoptimisation.py -k hand",
    ),
    Mutation(
        "judges", "an alarm where the judge rises", "ppo/overoptimisation.py",
        "torch.tensor(peak.judge).to(judge) - judge", "judge - torch.tensor(peak.judge).to(judge)",
        "test_overoptimisation.py -k hand",
    ),
    Mutation(
        "judges", "differences that are not paired", "ppo/overoptimisation.py",
        "proxy - torch.tensor(peak.proxy).to(proxy)", "proxy - torch.tensor(peak.proxy).to(proxy).mean()",
        "test_overoptimisation.py -k paired",
    ),
    Mutation(
        "judges", "alarms of few prompts", "ppo/overoptimisation.py", "if prompts < FEWEST:", "if prompts < 2:",
        "test_overoptimisation.py -k few",
    ),
    Mutation(
        "judges", "the peak is the first evaluation", "ppo/overoptimisation.py",
        "if name not in found or scores.mean() > ", "if name not in found or 0 > scores.mean() > ",
        "test_overoptimisation.py -k peak",
    ),
    Mutation(
        "judges", "the peak is the last of the best", "ppo/overoptimisation.py",
        "scores.mean() > torch", "scores.mean() >= torch",
        "test_overoptimisation.py -k peak",
    ),
    Mutation(
        "judges", "an evaluation is held against itself", "ppo/state.py",
        "        proxy, judges = columns[\"score\"], validation.judged(columns)\n",
        "        proxy, judges = columns[\"score\"], validation.judged(columns)\n"
        "        self.peaks = overoptimisation.followed({}, update, proxy, judges)\n",
        "test_overoptimisation.py -k too_much",
    ),
    Mutation(
        "judges", "the peaks are not restored", "ppo/state.py",
        "{name: Peak(*row) for name, row in progress.peaks.items()}", "{}",
        "test_resume.py -k 'same_bits and gpt2'",
    ),
    Mutation(
        "judges", "the policy before training may be the best", "ppo/validation.py",
        "found if update and within", "found if within",
        "test_validation.py -k 'remains or budget'",
    ),
    Mutation(
        "judges", "no evaluation before the first update", "ppo/trainer.py",
        "if self.progress.update == 0 and self.settings.eval_every:", "if False:",
        "test_validation.py -k before_the_first",
    ),
    Mutation(
        "judges", "another evaluation draws other numbers", "ppo/validation.py",
        'batching.generator(seed, "evaluate")', "None",
        "test_validation.py -k 'numbers or nothing_that_is_trained'",
    ),
    Mutation(
        "judges", "a process's prompts in another one's places", "ppo/validation.py",
        "table[:, mine] = ", "table[:, : len(made.responses)] = ",
        "test_processes.py",
    ),
    Mutation(
        "judges", "the held-out judge does not choose", "ppo/validation.py",
        'default = "judge/held_out" if "held_out" in judges else "score"', 'default = "score"',
        "test_validation.py -k held_out_judges",
    ),
    Mutation(
        "options", "the KL budget is not kept", "ppo/validation.py",
        "found.kl <= settings.kl_budget", "True",
        "test_validation.py -k budget",
    ),
    Mutation(
        "options", "the last policy remains in place of the best", "ppo/trainer.py",
        "        self.take_best()\n", "",
        "test_validation.py -k remains",
    ),
    Mutation(
        "options", "asked to end, it leaves no checkpoint", "ppo/trainer.py",
        "if self.progress.saved < update:\n                self.save()", "pass",
        "test_resume.py -k asked",
    ),
    Mutation(
        "options", "asked to end in its last update, it leaves no result", "ppo/trainer.py",
        "if asked and update < updates:", "if asked:",
        "test_resume.py -k asked",
    ),
]  # fmt: skip
