"""The formulas: hand-computed numbers, slow loops in float64, properties, and noise where the mask is False."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.ppo import core

MASK = torch.tensor([[True, True, True, False], [True, False, False, False], [True, True, True, True]])
NOISES = [0.0, 1e30, float("nan"), float("inf"), -float("inf")]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spoiled(x: Tensor, noise: float) -> Tensor:
    """``x`` with noise where the mask is False."""
    return torch.where(MASK, x, noise)


# ---------------------------------------------------------------------------------------------------- log-probabilities
def test_token_logprobs_and_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]])
    assert core.token_logprobs(logits, torch.tensor([0, 1])).tolist() == pytest.approx([math.log(0.25), math.log(0.5)])
    h = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert core.entropy(logits).tolist() == pytest.approx([h, math.log(2.0)])


def test_the_gradient_of_token_logprobs_is_that_of_autograd() -> None:
    logits, tokens = (3.0 * random(0, 5, 7)).float(), torch.tensor([0, 6, 3, 3, 1])
    weights = random(1, 5).float()
    ours, plain = logits.clone().requires_grad_(), logits.double().requires_grad_()
    (core.token_logprobs(ours, tokens) * weights).sum().backward()
    (plain.log_softmax(-1)[torch.arange(5), tokens] * weights).sum().backward()
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=1e-6, atol=1e-6)
    other = logits.clone().requires_grad_()
    loss = core.token_logprobs(other, tokens).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # rather than a wrong gradient
        loss.backward()


def test_low_precision_logits_are_reduced_in_float32() -> None:
    logits = torch.zeros(1, 5000, dtype=torch.bfloat16)
    assert core.token_logprobs(logits, torch.tensor([7])).item() == pytest.approx(-math.log(5000), rel=1e-6)
    assert core.entropy(logits).item() == pytest.approx(math.log(5000), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------------- KL
def test_kl_estimators_by_hand() -> None:
    logprobs, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert core.kl_per_token(logprobs, ref, mask, "k1").tolist()[0] == pytest.approx([0.5, -1.0])
    assert core.kl_per_token(logprobs, ref, mask, "k2").tolist()[0] == pytest.approx([0.125, 0.5])
    k3 = [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0]
    assert core.kl_per_token(logprobs, ref, mask, "k3").tolist()[0] == pytest.approx(k3)


def test_kl_estimators_by_monte_carlo() -> None:
    """k1 and k3 estimate the exact KL, k2 its own expectation, each within five standard errors."""
    p, q = random(0, 6).softmax(0), random(1, 6).softmax(0)
    tokens = torch.multinomial(p, 200_000, replacement=True, generator=torch.Generator().manual_seed(2))
    d = p.log() - q.log()
    expected = {"k1": (p * d).sum(), "k2": (p * d.square() / 2).sum(), "k3": (p * d).sum()}
    mask = torch.ones(1, len(tokens), dtype=torch.bool)
    for estimator, value in expected.items():
        terms = core.kl_per_token(p.log()[tokens][None], q.log()[tokens][None], mask, estimator)
        error = terms.std() / math.sqrt(len(tokens))
        assert abs(terms.mean() - value) < 5 * error, estimator
    assert abs(expected["k2"] - expected["k1"]) > 0.02  # else this test could not tell them apart


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed are k1, k2 and k3"):
        core.kl_per_token(random(0, 3, 4), random(1, 3, 4), MASK, "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allowed are off, replace and penalty"):
        core.episode_scores(torch.zeros(1), torch.tensor([True]), None, "skip", -1.0)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- rewards
def test_episode_scores() -> None:
    scores, ended = torch.tensor([3.0, -4.0, 0.5]), torch.tensor([True, False, False])
    assert core.episode_scores(scores, ended, None, "off", -1.0).tolist() == [3.0, -4.0, 0.5]
    assert core.episode_scores(scores, ended, 2.0, "off", -1.0).tolist() == [2.0, -2.0, 0.5]
    assert core.episode_scores(scores, ended, 2.0, "replace", -1.0).tolist() == [2.0, -1.0, -1.0]
    for value in (-1.0, 1.0):  # a magnitude
        assert core.episode_scores(scores, ended, 2.0, "penalty", value).tolist() == [2.0, -3.0, -0.5]


@pytest.mark.parametrize("noise", NOISES)
def test_token_rewards_put_the_score_on_the_last_token(noise: float) -> None:
    kl = spoiled(torch.full((3, 4), 2.0), noise)
    rewards = core.token_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, MASK, 0.5)
    assert rewards.tolist() == [[-1, -1, 9, 0], [19, 0, 0, 0], [-1, -1, -1, 29]]


def test_the_kl_controller() -> None:
    """Ziegler: proportional within the clip of 0.2, scaled by episodes / horizon."""
    assert core.next_kl_coef(0.1, 6.0, 6.0, 512, 10_000) == pytest.approx(0.1)
    assert core.next_kl_coef(0.1, 6.6, 6.0, 1000, 10_000) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert core.next_kl_coef(0.1, 60.0, 6.0, 1000, 10_000) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert core.next_kl_coef(0.1, 0.0, 6.0, 1000, 10_000) == pytest.approx(0.1 * (1 - 0.2 * 0.1))


def test_the_learning_rate_follows_the_approx_kl() -> None:
    assert core.next_lr_scale(1.0, 0.021, 0.01) == pytest.approx(1 / 1.5)
    assert core.next_lr_scale(1.0, 0.004, 0.01) == pytest.approx(1.5)
    for inside in (0.02, 0.005, 0.01):
        assert core.next_lr_scale(0.7, inside, 0.01) == 0.7
    assert core.next_lr_scale(0.011, 9.0, 0.01) == 0.01
    assert core.next_lr_scale(9.0, 0.0, 0.01) == 10.0


def test_running_moments_are_those_of_all_scores() -> None:
    scores = random(0, 4, 5) * 3.0 + 100.0
    running = core.Running()
    assert running.std == 1.0
    for row in scores:
        running = running.joined_by(row)
    assert running.number == 20
    assert running.mean == pytest.approx(scores.mean().item(), rel=1e-12)
    assert running.std == pytest.approx(scores.std(correction=0).item(), rel=1e-9)
    assert core.Running().joined_by(torch.ones(3)).std == 1.0  # nothing to divide by


# ----------------------------------------------------------------------------------------------------------- advantages
def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.5, 1.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    # delta_1 = 2 - 1 = 1; delta_0 = 1 + 0.5 * 1 - 0.5 = 1; A_0 = 1 + 0.5 * 0.8 * 1
    advantages, returns = core.generalized_advantages(rewards, values, mask, gamma=0.5, lam=0.8)
    torch.testing.assert_close(advantages, torch.tensor([[1.4, 1.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.9, 2.0, 0.0]]))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_gae_equals_its_definition(gamma: float, lam: float, noise: float) -> None:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, summed term by term."""
    rewards, values = random(0, 3, 4), random(1, 3, 4)
    advantages, returns = core.generalized_advantages(spoiled(rewards, noise), spoiled(values, noise), MASK, gamma, lam)
    for row, length in enumerate(MASK.sum(1).tolist()):
        for t in range(4):
            expected = 0.0
            for k in range(t, length):
                following = values[row, k + 1].item() if k + 1 < length else 0.0
                expected += (gamma * lam) ** (k - t) * (rewards[row, k] + gamma * following - values[row, k]).item()
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(
                expected + values[row, t].item() if t < length else 0.0, abs=1e-12
            )


@pytest.mark.parametrize("noise", NOISES)
def test_moments_and_whitening_equal_a_loop(noise: float) -> None:
    x = random(0, 3, 4)
    real = [x[i, j].item() for i in range(3) for j in range(4) if MASK[i, j]]
    mean = sum(real) / len(real)
    variance = sum((v - mean) ** 2 for v in real) / len(real)
    found = core.moments(spoiled(x, noise), MASK)
    assert (found.mean.item(), found.variance.item(), found.number.item()) == pytest.approx((mean, variance, 8))
    for keep_mean in (False, True):
        whitened = core.whiten(spoiled(x, noise), MASK, keep_mean)
        expected = (x - mean) / math.sqrt(variance + 1e-8) + (mean if keep_mean else 0.0)
        torch.testing.assert_close(whitened, torch.where(MASK, expected, 0.0))


def test_moments_of_two_processes_are_those_of_all_their_tokens() -> None:
    """``total`` is given both processes' tensors, in the order of the calls."""
    x = random(0, 3, 4) + 5.0
    parts = [(x[:1], MASK[:1]), (x[1:], MASK[1:])]
    mean = sum(core._real(a, m).sum() for a, m in parts) / MASK.sum()
    totals = iter([MASK.sum(), core._real(x, MASK).sum(), core._real(x - mean, MASK).square().sum()])
    found = core.moments(*parts[0], total=lambda own: next(totals))
    torch.testing.assert_close(found, core.moments(x, MASK))


def test_explained_variance() -> None:
    returns = random(0, 3, 4)
    assert core.explained_variance(returns, returns, MASK).item() == 1.0
    assert core.explained_variance(torch.zeros(3, 4), returns, MASK).item() == pytest.approx(0.0)
    assert core.explained_variance(spoiled(-returns, math.nan), returns, MASK).item() == pytest.approx(-3.0)
    assert math.isfinite(core.explained_variance(returns, torch.zeros(3, 4), MASK).item())


# --------------------------------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("noise", NOISES)
def test_policy_loss_equals_a_loop(noise: float) -> None:
    old, advantages = random(0, 3, 4) - 3.0, random(1, 3, 4)
    new = (old + 0.4 * random(2, 3, 4)).requires_grad_()
    gradient = torch.zeros(3, 4, dtype=torch.float64)
    found = core.policy_loss(spoiled(new, noise), spoiled(old, noise), spoiled(advantages, noise), MASK, 0.2)
    loss = kl = ratios = 0.0
    clipped, ratio_max = 0, 0.0
    for i, j in MASK.nonzero().tolist():
        ratio, a = math.exp(new[i, j].item() - old[i, j].item()), advantages[i, j].item()
        bounded = min(max(ratio, 0.8), 1.2)
        loss -= min(ratio * a, bounded * a)  # Schulman et al. 2017, equation 7: the smaller one is maximised
        clipped += bounded * a < ratio * a
        kl += ratio - 1 - math.log(ratio)
        ratios += ratio
        ratio_max = max(ratio_max, ratio)
        gradient[i, j] = 0.0 if bounded * a < ratio * a else -ratio * a  # d ratio / d log pi is the ratio
    assert clipped > 0
    assert [v.item() for v in found] == pytest.approx([loss, kl, clipped, ratios, ratio_max], rel=1e-6)
    found.loss.backward()
    torch.testing.assert_close(new.grad, gradient, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "gradient"),
    [
        (2.0, 0.0, -2.0),  # d/dlogp of -A r is -A r
        (2.0, 0.1, -2.0 * math.exp(0.1)),
        (2.0, 0.3, 0.0),  # beyond 1 + c and still rising: clipped
        (2.0, -0.3, -2.0 * math.exp(-0.3)),  # too low: free to come back
        (-2.0, -0.3, 0.0),
        (-2.0, 0.3, 2.0 * math.exp(0.3)),
    ],
)
def test_policy_gradient_by_hand(advantage: float, log_ratio: float, gradient: float) -> None:
    logprob = torch.tensor([[log_ratio, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    core.policy_loss(logprob, torch.zeros(1, 2), torch.full((1, 2), advantage), mask, 0.2).loss.backward()
    assert logprob.grad is not None
    assert logprob.grad.tolist()[0] == pytest.approx([gradient, 0.0])


def test_a_value_within_its_clip_is_not_counted_as_clipped() -> None:
    """Also where old + (new - old) would not be new again, to the last bit."""
    old, returns = random(0, 50, 4).float() * 3.0, random(1, 50, 4).float()
    values = old + 0.1 * random(2, 50, 4).float()
    inside = (values - old).abs() < 0.2
    assert core.value_loss(values, old, returns, inside, 0.2).clipped.item() == 0


@pytest.mark.parametrize("noise", NOISES)
def test_value_loss_equals_a_loop(noise: float) -> None:
    old, returns = random(0, 3, 4), random(1, 3, 4)
    values = (old + 0.5 * random(2, 3, 4)).requires_grad_()
    found = core.value_loss(spoiled(values, noise), spoiled(old, noise), spoiled(returns, noise), MASK, 0.2)
    found.loss.backward()
    loss, clipped, gradient = 0.0, 0, torch.zeros(3, 4, dtype=torch.float64)
    for i, j in MASK.nonzero().tolist():
        v, o, r = values[i, j].item(), old[i, j].item(), returns[i, j].item()
        near = min(max(v, o - 0.2), o + 0.2)
        loss += 0.5 * max((v - r) ** 2, (near - r) ** 2)
        if (near - r) ** 2 > (v - r) ** 2:
            clipped += 1
        else:
            gradient[i, j] = v - r
    assert clipped > 0
    assert [v.item() for v in found] == pytest.approx([loss, clipped], rel=1e-6)
    torch.testing.assert_close(values.grad, gradient, rtol=1e-6, atol=1e-12)
