"""Sampling: exact log-probabilities, draws that depend on nothing but their own row, the right distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from rlhf.config.ppo_options import Generation
from rlhf.models.adapt import add_lora
from rlhf.ppo import generation
from rlhf.ppo.batching import pad
from rlhf.ppo.decoding import allows_static
from rlhf.ppo.generation import Generated, generate, sample
from rlhf.ppo.policy import Policy
from rlhf.ppo.sequences import Sequences

ARCHITECTURES = ["gpt2", "llama", "falcon", "gpt_bigcode", "t5"]
BACKENDS = ["dynamic", "static", "transformers"]
LIMIT = 9


def run(
    tiny: Any, policy: Policy, rows: slice = slice(None), backend: Generation = "auto"
) -> tuple[Tensor, Tensor, Generated]:
    """Responses to the test prompts, four of each."""
    tokenizer = tiny.tokenizer()
    prompts, lengths = pad((tokenizer(list(tiny.words))["input_ids"] * 4)[rows])
    uniforms = torch.rand(24, LIMIT, generator=torch.Generator().manual_seed(5))[rows]
    return prompts, lengths, generate(policy, prompts, lengths, uniforms, 0.7, tokenizer.eos_token_id, backend)


def real(found: Generated) -> Tensor:
    return Sequences(found.responses, found.lengths, found.responses, found.lengths).mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_of_sampled_tokens_are_those_of_a_plain_forward(
    architecture: str, lora: bool, backend: Generation, tiny: Any
) -> None:
    model = tiny.policy_model(architecture)
    policy = Policy(add_lora(model, 2, 8.0) if lora else model).eval()
    policy.value_head = torch.nn.Linear(16, 1)
    prompts, lengths, found = run(tiny, policy, backend=backend)
    sequences = Sequences(prompts, lengths, found.responses, found.lengths)
    with torch.no_grad():
        expected = policy(sequences, 0.7, with_entropy=True)
    mask = sequences.mask
    assert len(set(found.lengths.tolist())) > 2  # rows were dropped on the way
    torch.testing.assert_close(found.logprobs[mask], expected.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropies[mask], expected.entropies, rtol=1e-5, atol=1e-5)
    if backend == "transformers":  # it does not show its hidden states
        assert found.values is None
    else:
        torch.testing.assert_close(found.values[mask], expected.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_back_end_draws_the_same(architecture: str, tiny: Any) -> None:
    policy = Policy(tiny.policy_model(architecture)).eval()
    _, _, expected = run(tiny, policy, backend="dynamic")
    for backend in ("static", "transformers"):
        _, _, found = run(tiny, policy, backend=backend)  # type: ignore[arg-type]
        assert torch.equal(found.lengths, expected.lengths)
        assert torch.equal(found.responses[real(found)], expected.responses[real(expected)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_is_sampled_alike_alone_and_among_others(
    architecture: str, backend: Generation, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither left padding nor dropping finished rows reaches the other rows."""
    policy = Policy(tiny.policy_model(architecture)).eval()
    _, _, together = run(tiny, policy, backend=backend)
    monkeypatch.setattr(generation, "DROP_FINISHED_AT", 2.0)  # never
    _, _, undropped = run(tiny, policy, backend=backend)
    assert torch.equal(together.lengths, undropped.lengths)
    assert torch.equal(together.responses[real(together)], undropped.responses[real(undropped)])
    for row in range(8):
        _, _, alone = run(tiny, policy, slice(row, row + 1), backend)
        length = int(alone.lengths[0])
        assert length == together.lengths[row]
        assert torch.equal(alone.responses[0, :length], together.responses[row, :length])
        torch.testing.assert_close(alone.logprobs[0, :length], together.logprobs[row, :length], rtol=1e-5, atol=1e-5)


def test_a_static_decoder_serves_the_next_batch_and_the_weights_of_then(tiny: Any) -> None:
    policy = Policy(tiny.policy_model("llama")).eval()
    first = run(tiny, policy, slice(0, 6), "static")[2]
    run(tiny, policy, slice(6, 12), "static")
    assert torch.equal(run(tiny, policy, slice(0, 6), "static")[2].logprobs, first.logprobs)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.9)
    expected = run(tiny, policy, slice(0, 6), "dynamic")[2]
    found = run(tiny, policy, slice(0, 6), "static")[2]
    assert torch.equal(found.responses[real(found)], expected.responses[real(expected)])
    assert len(policy.static_decoders) == 1  # one shape


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_static_cache_in_low_precision(architecture: str, tiny: Any) -> None:
    """Rotary embeddings leave keys in float32 and values in bfloat16; one cache takes both."""
    policy = Policy(tiny.policy_model(architecture)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (run(tiny, policy, backend=backend)[2] for backend in ("static", "dynamic"))  # type: ignore[arg-type]
    first = found.logprobs[:, 0] - expected.logprobs[:, 0]
    assert torch.isfinite(found.logprobs[real(found)]).all()
    assert first.abs().max() < 0.2


def test_models_with_attention_windows_are_decoded_with_a_growing_cache() -> None:
    shape: dict[str, Any] = {"vocab_size": 270, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 1, "eos_token_id": 0}
    windowed = MistralForCausalLM(MistralConfig(**shape, sliding_window=4)).eval()
    assert not allows_static(windowed)
    assert allows_static(MistralForCausalLM(MistralConfig(**shape, sliding_window=None)))
    prompts, lengths = pad([[5, 6, 7, 8, 9, 10], [11, 12]])
    found = generate(Policy(windowed), prompts, lengths, torch.full((2, 6), 0.4), 1.0, 0, "static")
    expected = generate(Policy(windowed), prompts, lengths, torch.full((2, 6), 0.4), 1.0, 0, "transformers")
    assert torch.equal(found.responses, expected.responses)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_attention_that_adds_its_mask_is_decoded_with_a_growing_cache(architecture: str, tiny: Any) -> None:
    """An eager implementation would add True and False as 1 and 0."""
    model = tiny.policy_model(architecture)
    expected = run(tiny, Policy(model), backend="static")[2]
    assert allows_static(model)
    model.set_attn_implementation("eager")
    assert not allows_static(model)
    found = run(tiny, Policy(model), backend="static")[2]
    assert torch.equal(found.responses[real(found)], expected.responses[real(expected)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_be_decoded_in_several_batches(backend: Generation, tiny: Any) -> None:
    policy = Policy(tiny.policy_model(), torch.nn.Linear(16, 1)).eval()
    prompts, lengths, expected = run(tiny, policy, backend=backend)
    uniforms = torch.rand(24, LIMIT, generator=torch.Generator().manual_seed(5))
    found = generate(policy, prompts, lengths, uniforms, 0.7, 0, backend, rows_at_once=7)
    mask = real(expected)
    assert torch.equal(found.lengths, expected.lengths)
    assert torch.equal(found.ended, expected.ended)
    assert torch.equal(found.responses[mask], expected.responses[mask])
    for name in ("logprobs", "entropies", "values"):
        if getattr(expected, name) is not None:
            torch.testing.assert_close(getattr(found, name)[mask], getattr(expected, name)[mask], rtol=1e-5, atol=1e-5)


def test_a_static_decoder_of_another_shape_takes_the_place_of_the_last(tiny: Any) -> None:
    policy = Policy(tiny.policy_model()).eval()
    for rows in (4, 6, 4):
        run(tiny, policy, slice(0, rows), "static")
        assert [shape[0] for shape in policy.static_decoders] == [rows]


def test_greedy_takes_the_likeliest(tiny: Any) -> None:
    model = tiny.policy_model("llama")
    prompts, lengths = pad([tiny.tokenizer()(tiny.words[0])["input_ids"]])
    found = generate(Policy(model), prompts, lengths, torch.full((1, 5), 0.99), generation.GREEDY, -1)
    ids = prompts[0]
    for token in found.responses[0]:
        assert token == model(input_ids=ids[None]).logits[0, -1].argmax()
        ids = torch.cat([ids, token[None]])


def test_a_response_ends_at_its_first_end_of_sequence(tiny: Any) -> None:
    _, _, found = run(tiny, Policy(tiny.policy_model()).eval())
    eos = tiny.tokenizer().eos_token_id
    assert found.ended.any()
    assert not found.ended.all()
    for row, length, ended in zip(found.responses, found.lengths.tolist(), found.ended.tolist(), strict=True):
        assert (row[: length - 1] != eos).all()
        assert (row[length - 1] == eos) == ended
        assert ended or length == LIMIT


@pytest.mark.parametrize(("backend", "most"), [("dynamic", 0), ("static", 15), ("transformers", 0)])
def test_generation_stops_when_every_row_has_ended(
    backend: Generation, most: int, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, or where a look would make a GPU wait, at the next look."""
    model = tiny.policy_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely; the first one, which ends, at uniform 0
    steps = 0

    def count(*arguments: Any) -> None:
        nonlocal steps
        steps += 1

    model.transformer.register_forward_hook(count)
    prompts, lengths = pad([[5, 6, 7], [8]])
    found = generate(Policy(model), prompts, lengths, torch.zeros(2, 40), 1.0, 0, backend)
    assert (found.responses.tolist(), found.lengths.tolist()) == ([[0], [0]], [1, 1])
    assert steps - 1 <= most


def test_the_models_own_generation_settings_are_not_used(tiny: Any) -> None:
    model = tiny.policy_model()
    expected = run(tiny, Policy(model).eval())[2]
    model.generation_config.update(top_k=1, temperature=3.0, repetition_penalty=9.0, max_new_tokens=1, min_length=30)
    for backend in BACKENDS:
        found = run(tiny, Policy(model).eval(), backend=backend)[2]  # type: ignore[arg-type]
        assert torch.equal(found.responses[real(found)], expected.responses[real(expected)])
        assert torch.equal(found.lengths, expected.lengths)
    assert model.generation_config.repetition_penalty == 9.0


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
