"""Sampling: exact log-probabilities, draws that depend on nothing but their own row, the right distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.models import add_lora
from rlhf.ppo import generation
from rlhf.ppo.batching import pad
from rlhf.ppo.generation import Generated, generate, sample
from rlhf.ppo.policy import Policy
from rlhf.ppo.sequences import Sequences

ARCHITECTURES = ["gpt2", "llama", "falcon", "gpt_bigcode", "t5"]
LIMIT = 9


def run(tiny: Any, policy: Policy, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Generated]:
    """Responses to the test prompts, four of each."""
    tokenizer = tiny.tokenizer()
    prompts, lengths = pad((tokenizer(list(tiny.words))["input_ids"] * 4)[rows])
    uniforms = torch.rand(24, LIMIT, generator=torch.Generator().manual_seed(5))[rows]
    return prompts, lengths, generate(policy, prompts, lengths, uniforms, 0.7, tokenizer.eos_token_id)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_of_sampled_tokens_are_those_of_a_plain_forward(architecture: str, lora: bool, tiny: Any) -> None:
    model = tiny.policy_model(architecture)
    policy = Policy(add_lora(model, 2, 8.0) if lora else model).eval()
    prompts, lengths, found = run(tiny, policy)
    sequences = Sequences(prompts, lengths, found.responses, found.lengths)
    with torch.no_grad():
        expected = policy(sequences, 0.7, with_entropy=True)
    mask = sequences.mask
    assert len(set(found.lengths.tolist())) > 2  # rows were dropped on the way
    torch.testing.assert_close(found.logprobs[mask], expected.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropies[mask], expected.entropies, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_is_sampled_alike_alone_and_among_others(
    architecture: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither left padding nor dropping finished rows reaches the other rows."""
    policy = Policy(tiny.policy_model(architecture)).eval()
    _, _, together = run(tiny, policy)
    monkeypatch.setattr(generation, "DROP_FINISHED_AT", 2.0)  # never
    _, _, undropped = run(tiny, policy)
    mask = Sequences(together.responses, together.lengths, together.responses, together.lengths).mask
    assert torch.equal(together.lengths, undropped.lengths)
    assert torch.equal(together.responses[mask], undropped.responses[mask])
    for row in range(8):
        _, _, alone = run(tiny, policy, slice(row, row + 1))
        length = int(alone.lengths[0])
        assert length == together.lengths[row]
        assert torch.equal(alone.responses[0, :length], together.responses[row, :length])
        torch.testing.assert_close(alone.logprobs[0, :length], together.logprobs[row, :length], rtol=1e-5, atol=1e-5)


def test_a_response_ends_at_its_first_end_of_sequence(tiny: Any) -> None:
    _, _, found = run(tiny, Policy(tiny.policy_model()).eval())
    eos = tiny.tokenizer().eos_token_id
    assert found.ended.any()
    assert not found.ended.all()
    for row, length, ended in zip(found.responses, found.lengths.tolist(), found.ended.tolist(), strict=True):
        assert (row[: length - 1] != eos).all()
        assert (row[length - 1] == eos) == ended
        assert ended or length == LIMIT


def test_generation_stops_when_every_row_has_ended(tiny: Any) -> None:
    calls = 0

    class Ending:
        def decoder(self, prompts: Tensor, lengths: Tensor) -> Any:
            return self

        def start(self) -> Tensor:
            return torch.tensor([[0.0, 50.0], [0.0, 50.0]])

        def step(self, tokens: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return self.start()

    found = generate(Ending(), torch.ones(2, 1), torch.ones(2), torch.full((2, LIMIT), 0.5), 1.0, 1)  # type: ignore[arg-type]
    assert (found.responses.tolist(), found.lengths.tolist(), calls) == ([[1], [1]], [1, 1], 0)


def test_the_models_own_generation_settings_are_not_used(tiny: Any) -> None:
    model = tiny.policy_model()
    expected = run(tiny, Policy(model).eval())[2]
    model.generation_config.update(top_k=1, temperature=3.0, repetition_penalty=9.0, max_new_tokens=1)
    assert torch.equal(run(tiny, Policy(model).eval())[2].responses, expected.responses)


def test_sample_inverts_the_distribution_function() -> None:
    """A grid of uniforms hits each token in proportion to its probability, to the grid's resolution."""
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0))
    count = 20_000
    drawn = sample(logits.expand(count, 7), (torch.arange(count) + 0.5) / count)
    shares = torch.bincount(drawn.tokens, minlength=7) / count
    torch.testing.assert_close(shares, logits.softmax(0), atol=2 / count, rtol=0)
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(0)[drawn.tokens])
    assert drawn.entropies[0].item() == pytest.approx(torch.distributions.Categorical(logits=logits).entropy().item())


def test_sample_never_draws_what_is_impossible() -> None:
    for tail in (-torch.inf, 0.0):
        logits = torch.tensor([-torch.inf, 0.3, -torch.inf, 0.1, tail]).expand(4, 5)
        drawn = sample(logits, torch.tensor([0.0, 0.5, 1.0 - 2**-24, 1e-9]))
        assert torch.isfinite(drawn.logprobs).all()
        assert torch.isfinite(drawn.entropies).all()
    drawn = sample(torch.zeros(1, 50_000), torch.tensor([1.0 - 2**-24]))
    assert int(drawn.tokens) < 50_000
