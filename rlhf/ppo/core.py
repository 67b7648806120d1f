"""The mathematics of PPO as pure functions on tensors.

Shapes: B episodes, T response tokens of the longest one, V vocabulary. Token t of a response is action a_t; the state
s_t is the prompt with the response before t. A ``mask`` (B, T) is True for real response tokens; whatever else a
tensor holds, NaN included, changes no result. Every reduction says its denominator. ``total`` sums a tensor over all
processes of a distributed run (the identity for one), so that denominators count the tokens of all of them.

Sources: Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (PPO); Schulman et al. 2016,
"High-Dimensional Continuous Control Using Generalized Advantage Estimation" (GAE); Ziegler et al. 2019,
"Fine-Tuning Language Models from Human Preferences" (Ziegler); Stiennon et al. 2020, "Learning to Summarize from Human
Feedback" (Stiennon).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

KlEstimator = Literal["k1", "k2", "k3"]
MissingEos = Literal["off", "replace", "penalty"]
Total = Callable[[Tensor], Tensor]


def own(tensor: Tensor) -> Tensor:
    """The ``total`` of a run with one process: its own."""
    return tensor


# ---------------------------------------------------------------------------------------------------- log-probabilities
def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token] in float32. ``logits`` (N, V) are divided by the temperature already; (N,) -> (N,)."""
    result: Tensor = _TokenLogprobs.apply(logits.float(), tokens[:, None])  # type: ignore[no-untyped-call]
    return result


class _TokenLogprobs(torch.autograd.Function):
    """One column of a log-softmax. d log p(token) / d logit_v = [v = token] - p_v.

    Autograd would fill a table (N, V) with zeros but for one column, and pass it through the log-softmax's backward.
    Here the one table that the forward pass keeps becomes the gradient, in place: backward runs once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1)
        ctx.save_for_backward(logprobs, tokens)
        return logprobs.gather(1, tokens)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logprobs, tokens = ctx.saved_tensors
        table = logprobs.exp_().mul_(-gradient[:, None])
        return table.scatter_add_(1, tokens, gradient[:, None]), None


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits): H = -sum_v p_v log p_v, in float32. (N, V) -> (N,)."""
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate KL(pi || pi_ref) in nats at each token that was sampled from pi. (B, T), 0 where masked.

    With d = log pi(a|s) - log pi_ref(a|s): k1 = d is unbiased, of either sign; k2 = d^2 / 2 is biased and never
    negative; k3 = exp(-d) - 1 + d is unbiased and never negative. Schulman 2020, http://joschu.net/blog/kl-approx.html
    """
    d = _real(logprobs - ref_logprobs, mask)
    match estimator:
        case "k1":
            return d
        case "k2":
            return 0.5 * d.square()
        case "k3":
            return torch.expm1(-d) + d
    raise ValueError(f"kl_estimator is {estimator!r}; allowed are k1, k2 and k3")


# -------------------------------------------------------------------------------------------------------------- rewards
def episode_scores(
    scores: Tensor, ended: Tensor, clip: float | None, missing_eos: MissingEos, missing_eos_value: float
) -> Tensor:
    """Scores (B,) as they enter the rewards: clipped to [-clip, clip], then the rule for responses that did not end.

    ``ended`` (B,) is True where the response has an end-of-sequence token. For the others ``replace`` puts
    ``missing_eos_value`` in place of the score (Stiennon), ``penalty`` subtracts its magnitude.
    """
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    match missing_eos:
        case "off":
            return scores
        case "replace":
            return torch.where(ended, scores, missing_eos_value)
        case "penalty":
            return torch.where(ended, scores, scores - abs(missing_eos_value))
    raise ValueError(f"missing_eos is {missing_eos!r}; allowed are off, replace and penalty")


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (B, T): r_t = -kl_coef * KL_t, plus the score at the response's last token. 0 where masked.

    Ziegler, equation 2. ``scores`` (B,), ``kl`` (B, T) in nats. Each response has at least one token.
    """
    rewards = _real(-kl_coef * kl, mask)
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


class Running(NamedTuple):
    """Number, mean and sum of squared deviations of all scores so far."""

    number: float = 0.0
    mean: float = 0.0
    deviations: float = 0.0

    def joined_by(self, scores: Tensor, total: Total = own) -> Running:
        """With one more batch of scores (B,), those of all processes.

        Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
        """
        found = moments(scores.double(), torch.ones_like(scores, dtype=torch.bool), total)
        mean, variance, number = (x.item() for x in found)
        count, difference = self.number + number, mean - self.mean
        between = difference**2 * self.number * number / count
        return Running(count, self.mean + difference * number / count, self.deviations + variance * number + between)

    @property
    def std(self) -> float:
        """The population standard deviation; 1 while all scores have been the same."""
        return (self.deviations / self.number) ** 0.5 if self.deviations > 0.0 else 1.0


def next_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """The coefficient after an update whose mean KL was ``kl`` nats per sequence, by Ziegler's controller (2.2).

    e = clip(kl / target - 1, -0.2, 0.2); kl_coef * (1 + e * episodes / horizon).
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)


def next_lr_scale(scale: float, approx_kl: float, target: float) -> float:
    """The factor on the learning rate after an update that moved the policy by ``approx_kl`` nats per token.

    Divided by 1.5 above 2 * target, multiplied by 1.5 below target / 2, and kept within 0.01 and 10. The rule is
    that of Schulman et al. 2017, section 4, for a penalty coefficient; Rudin et al. 2022, "Learning to Walk in Minutes
    Using Massively Parallel Deep Reinforcement Learning", apply it to the learning rate, with the factor 1.5.
    """
    if approx_kl > 2.0 * target:
        return max(scale / 1.5, 0.01)
    if approx_kl < 0.5 * target:
        return min(scale * 1.5, 10.0)
    return scale


# ----------------------------------------------------------------------------------------------------------- advantages
class Advantages(NamedTuple):
    """Both (B, T), 0 where masked."""

    advantages: Tensor
    returns: Tensor


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Advantages:
    """GAE: delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; the return is A_t + V_t.

    ``values`` (B, T) holds V(s_t), the value before token t. Every response ends the episode: after its last
    token V and A are 0, whether or not it ended by an end-of-sequence token. GAE, equations 11 to 16.
    Real tokens are a prefix of each row. One reverse scan over the T columns.
    """
    rewards, values = _real(rewards, mask), _real(values, mask)
    following = F.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * following - values
    advantage = torch.zeros_like(deltas[:, 0])
    columns = []
    for t in range(deltas.shape[1] - 1, -1, -1):
        advantage = deltas[:, t] + gamma * lam * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)  # columns past a row's end are 0, since their deltas are
    return Advantages(advantages, advantages + values)


class Moments(NamedTuple):
    """Mean and population variance (0-dimensional) over ``number`` real tokens of all processes."""

    mean: Tensor
    variance: Tensor
    number: Tensor


def moments(x: Tensor, mask: Tensor, total: Total = own) -> Moments:
    """Mean and variance of the real entries of ``x``, both with their number as denominator; in two passes."""
    x = _real(x, mask)
    count = total(mask.sum())
    mean = total(x.sum()) / count
    variance = total(_real(x - mean, mask).square().sum()) / count
    return Moments(mean, variance, count)


def whiten(x: Tensor, mask: Tensor, keep_mean: bool = False, total: Total = own) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) with the moments of all real tokens; 0 where masked.

    With ``keep_mean`` the mean is added back: only the spread changes.
    """
    mean, variance, _ = moments(x, mask, total)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return _real(whitened + mean if keep_mean else whitened, mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, total: Total = own) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over all real tokens; 1 is a perfect value model, 0 a constant one."""
    left = moments(returns - values, mask, total).variance
    return 1.0 - left / moments(returns, mask, total).variance.clamp_min(1e-8)


# --------------------------------------------------------------------------------------------------------------- losses
class PolicyLoss(NamedTuple):
    """Sums over the real tokens of a micro-batch; the caller divides by the number of them in the whole minibatch.

    ``loss`` has a gradient, the others have none. ``ratio_max`` is a maximum.
    """

    loss: Tensor
    approx_kl: Tensor
    clipped: Tensor
    ratio: Tensor
    ratio_max: Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> PolicyLoss:
    """The clipped objective, to be minimised: sum_t max(-A_t r_t, -A_t clip(r_t, 1 - c, 1 + c)). PPO, equation 7.

    r_t = pi(a_t|s_t) / pi_old(a_t|s_t). All tensors (B, T). ``approx_kl`` sums (r_t - 1) - log r_t, the k3 estimate
    of KL(pi_old || pi) under tokens from pi_old; ``clipped`` counts the tokens whose clipped term is the larger one
    (their gradient is 0).
    """
    advantages = _real(advantages, mask)
    log_ratio = _real(logprobs - old_logprobs, mask)  # before exp: a masked entry must not overflow
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    real_ratio = _real(ratio.detach(), mask)
    return PolicyLoss(
        loss=torch.maximum(plain, clipped).sum(),
        approx_kl=(torch.expm1(log_ratio) - log_ratio).detach().sum(),
        clipped=(clipped > plain).sum(),
        ratio=real_ratio.sum(),
        ratio_max=real_ratio.max(),
    )


class ValueLoss(NamedTuple):
    """Sums over the real tokens of a micro-batch; ``loss`` has a gradient, ``clipped`` counts tokens."""

    loss: Tensor
    clipped: Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> ValueLoss:
    """sum_t 1/2 max((V_t - R_t)^2, (clip(V_t, V_old - c, V_old + c) - R_t)^2). All tensors (B, T).

    The clip is that of OpenAI's PPO implementation (baselines, ppo2). ``clipped`` counts the tokens whose clipped
    term is the larger one.
    """
    values, old_values, returns = _real(values, mask), _real(old_values, mask), _real(returns, mask)
    near = values.clamp(old_values - clip_range, old_values + clip_range)  # exactly the value where it does not bind
    plain, clipped = (values - returns).square(), (near - returns).square()
    return ValueLoss(0.5 * torch.maximum(plain, clipped).sum(), (clipped > plain).sum())


def _real(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where the mask is True, 0 elsewhere; a product would keep NaN."""
    return torch.where(mask, x, 0.0)
