"""Forward passes: the same numbers whatever the padding, the chunks, and the adapter's state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from rlhf.errors import ModelError
from rlhf.models import add_lora
from rlhf.ppo import policy as module
from rlhf.ppo.policy import Policy, ValueModel
from rlhf.ppo.sequences import Sequences, unpack

ARCHITECTURES = ["gpt2", "llama", "falcon", "gpt_bigcode", "t5"]
LENGTHS = [(3, 4), (1, 6), (9, 1), (5, 5)]


def wider(sequences: Sequences, filler: int) -> Sequences:
    """The same rows with more padding, and something else in it."""
    result = []
    for ids, lengths in (
        (sequences.prompts, sequences.prompt_lengths),
        (sequences.responses, sequences.response_lengths),
    ):
        padded = torch.nn.functional.pad(ids, (0, 5), value=filler)
        result += [torch.where(module.prefix_mask(lengths, padded.shape[1]), padded, filler), lengths]
    return Sequences(*result)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_are_those_of_a_plain_forward(architecture: str, tiny: Any) -> None:
    """Row by row, without padding, from the whole model's logits."""
    model, sequences = tiny.policy_model(architecture), tiny.sequences(LENGTHS)
    found = Policy(model)(sequences, 0.7, with_entropy=True)
    expected, entropies = [], []
    for i, (start, length) in enumerate(LENGTHS):
        ids = torch.cat([sequences.prompts[i, :start], sequences.responses[i, :length]])
        logits = model(input_ids=ids[None]).logits[0, start - 1 : -1] / 0.7
        distribution = torch.distributions.Categorical(logits=logits)
        expected.append(distribution.log_prob(ids[start:]))
        entropies.append(distribution.entropy())
    torch.testing.assert_close(found.logprobs, torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropies, torch.cat(entropies), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_nothing(architecture: str, tiny: Any) -> None:
    policy, value = Policy(tiny.policy_model(architecture)), ValueModel(tiny.value_model(architecture))
    sequences = tiny.sequences(LENGTHS)
    for filler in (0, 7, 10**9):  # the last is no token at all: it must never be looked up
        other = wider(sequences, filler)
        assert torch.equal(policy(other, 1.0).logprobs, policy(sequences, 1.0).logprobs)
        assert torch.equal(value(other), value(sequences))


def test_select_takes_rows_and_cuts_columns(tiny: Any) -> None:
    sequences = tiny.sequences(LENGTHS)
    part = sequences.select(torch.tensor([3, 0]))
    assert part.prompts.shape == (2, 5)
    assert part.responses.shape == (2, 5)
    policy = Policy(tiny.policy_model())
    whole = unpack(policy(sequences, 1.0).logprobs, sequences.mask)
    chosen = unpack(policy(part, 1.0).logprobs, part.mask)
    torch.testing.assert_close(chosen, whole[[3, 0], :5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chunks_change_neither_numbers_nor_gradients(
    architecture: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for elements in (2**26, 270 * 3):  # all rows at once, and three rows at once
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", elements)
        model = tiny.policy_model(architecture)
        found = Policy(model)(tiny.sequences(LENGTHS), 0.7, with_entropy=True)
        (found.logprobs.sum() + found.entropies.square().sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((found.logprobs, found.entropies, gradient))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_unpack_is_the_inverse_of_the_mask(tiny: Any) -> None:
    mask = tiny.sequences(LENGTHS).mask
    packed = torch.arange(1.0, mask.sum() + 1, requires_grad=True)
    table = unpack(packed, mask)
    assert torch.equal(table[mask], packed)
    assert (table[~mask] == 0).all()
    (table * torch.arange(mask.numel()).view(mask.shape)).sum().backward()
    assert torch.equal(packed.grad, torch.arange(mask.numel()).view(mask.shape)[mask].float())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_are_the_normalised_scores_before_each_token(architecture: str, tiny: Any) -> None:
    model, sequences = tiny.value_model(architecture), tiny.sequences(LENGTHS)
    model.config.score_mean, model.config.score_std = 0.5, 2.0
    values = unpack(ValueModel(model)(sequences), sequences.mask)
    for i, (start, length) in enumerate(LENGTHS):
        ids = torch.cat([sequences.prompts[i, :start], sequences.responses[i, :length]])
        for t in range(length):  # a classifier reads its last token
            model.config.pad_token_id = None
            logit = model(input_ids=ids[None, : start + t]).logits[0, 0]
            torch.testing.assert_close(values[i, t], (logit - 0.5) / 2.0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_adapter_a_lora_policy_is_its_base(architecture: str, tiny: Any) -> None:
    base, sequences = Policy(tiny.policy_model(architecture)), tiny.sequences(LENGTHS)
    policy = Policy(add_lora(tiny.policy_model(architecture), 2, 8.0))
    expected = base(sequences, 0.7).logprobs
    assert torch.equal(policy(sequences, 0.7).logprobs, expected)  # a new adapter changes nothing
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    assert not torch.allclose(policy(sequences, 0.7).logprobs, expected, atol=1e-2)
    with policy.without_adapter():
        assert torch.equal(policy(sequences, 0.7).logprobs, expected)
    assert not torch.allclose(policy(sequences, 0.7).logprobs, expected, atol=1e-2)


def test_check_accepts_a_model_that_caps_its_logits_and_refuses_one_that_scales_them(tiny: Any) -> None:
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0}
    capped = Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=8, final_logit_softcapping=0.5, eos_token_id=1))
    Policy(capped.eval()).check()
    scaled = GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=0.1, eos_token_id=1))
    torch.nn.init.normal_(scaled.lm_head.weight)
    with pytest.raises(ModelError, match="granite"):
        Policy(scaled.eval()).check()
    Policy(tiny.policy_model()).check()
