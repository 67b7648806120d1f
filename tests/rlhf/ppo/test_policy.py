"""Forward passes: the same numbers whatever the padding, the chunks, and the adapter's state."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf.errors import ModelError
from rlhf.models.adapt import add_lora
from rlhf.ppo import policy as module
from rlhf.ppo.checks import check_policy
from rlhf.ppo.policy import Policy, ValueModel, exact_kl, zero_head
from rlhf.ppo.sequences import unpack

ARCHITECTURES = ["gpt2", "llama", "falcon", "gpt_bigcode", "t5"]
LENGTHS = [(3, 4), (1, 6), (9, 1), (5, 5)]


def own_logits(model: PreTrainedModel, prompt: Tensor, response: Tensor) -> Tensor:
    """The whole model's logits (T, V) of a response's tokens, from one row without padding or cache."""
    if model.config.is_encoder_decoder:
        shifted = torch.cat([torch.tensor([model.config.decoder_start_token_id]), response[:-1]])
        logits: Tensor = model(input_ids=prompt[None], decoder_input_ids=shifted[None]).logits[0]
        return logits
    whole: Tensor = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    return whole


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_are_those_of_a_plain_forward(architecture: str, lora: int, tiny: Any) -> None:
    """Row by row, without padding, from the whole model's logits."""
    model, sequences = tiny.policy_model(architecture), tiny.sequences(LENGTHS)
    policy = Policy(add_lora(model, lora, 8.0) if lora else model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    found = policy(sequences, 0.7, with_entropy=True)
    expected, entropies = [], []
    for i, (start, length) in enumerate(LENGTHS):
        tokens = sequences.responses[i, :length]
        logits = own_logits(policy.language_model, sequences.prompts[i, :start], tokens) / 0.7
        distribution = torch.distributions.Categorical(logits=logits)
        expected.append(distribution.log_prob(tokens))
        entropies.append(distribution.entropy())
    torch.testing.assert_close(found.logprobs, torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropies, torch.cat(entropies), rtol=1e-5, atol=1e-5)


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
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=1e-5, atol=1e-5)
    assert ((results[0][2] - results[1][2]).norm() / results[1][2].norm()).item() < 1e-5


def test_unpack_is_the_inverse_of_the_mask(tiny: Any) -> None:
    mask = tiny.sequences(LENGTHS).mask
    packed = torch.arange(1.0, mask.sum() + 1, requires_grad=True)
    table = unpack(packed, mask)
    assert torch.equal(table[mask], packed)
    assert (table[~mask] == 0).all()
    (table * torch.arange(mask.numel()).view(mask.shape)).sum().backward()
    assert torch.equal(packed.grad, torch.arange(mask.numel()).view(mask.shape)[mask].float())


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "t5"])
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
def test_a_value_head_reads_the_state_before_each_token(architecture: str, tiny: Any) -> None:
    """On the policy's trunk, and on a copy of it: both from the last hidden state of the model's own forward."""
    model, sequences = tiny.policy_model(architecture), tiny.sequences(LENGTHS)
    shared, own = Policy(model, zero_head(model)), ValueModel.like(Policy(model))
    assert shared(sequences, 1.0).values.count_nonzero() == own(sequences).count_nonzero() == 0
    for head in (shared.value_head, own.head):
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    values = shared(sequences, 1.0).values
    torch.testing.assert_close(own(sequences), values)
    expected = []
    for i, (start, length) in enumerate(LENGTHS):
        prompt, tokens = sequences.prompts[i, :start], sequences.responses[i, :length]
        if architecture == "t5":
            shifted = torch.cat([torch.tensor([model.config.decoder_start_token_id]), tokens[:-1]])
            made = model(input_ids=prompt[None], decoder_input_ids=shifted[None], output_hidden_states=True)
            hidden = made.decoder_hidden_states[-1][0]
        else:
            made = model(input_ids=torch.cat([prompt, tokens])[None], output_hidden_states=True)
            hidden = made.hidden_states[-1][0, start - 1 : -1]
        expected.append(hidden @ shared.value_head.weight[0])
    torch.testing.assert_close(values, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_the_output_layer_of_a_value_model_does_not_learn(tiny: Any) -> None:
    model = tiny.policy_model("t5")
    model.lm_head = torch.nn.Linear(16, 270, bias=False)  # as in Flan-T5, whose output layer is one of its own
    value = ValueModel.like(Policy(model))
    assert not value.model.lm_head.weight.requires_grad
    assert value.model.shared.weight.requires_grad
    tied = ValueModel.like(Policy(tiny.policy_model("t5")))
    assert tied.model.shared.weight.requires_grad


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_of_a_lora_policy_is_its_base(architecture: str, tiny: Any) -> None:
    base, sequences = Policy(tiny.policy_model(architecture)), tiny.sequences(LENGTHS)
    policy = Policy(add_lora(tiny.policy_model(architecture), 2, 8.0))
    expected = base(sequences, 0.7).logprobs
    assert torch.equal(policy(sequences, 0.7).logprobs, expected)  # a new adapter changes nothing
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05)
    assert not torch.allclose(policy(sequences, 0.7).logprobs, expected, atol=1e-2)
    assert torch.equal(policy.as_reference()(sequences, 0.7).logprobs, expected)
    assert not torch.allclose(policy(sequences, 0.7).logprobs, expected, atol=1e-2)


def test_check_accepts_a_model_that_caps_its_logits_and_refuses_one_that_scales_them(tiny: Any) -> None:
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0}
    capped = Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=8, final_logit_softcapping=0.5, eos_token_id=1))
    check_policy(Policy(capped.eval()))
    scaled = GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=0.1, eos_token_id=1))
    torch.nn.init.normal_(scaled.lm_head.weight)
    with pytest.raises(ModelError, match="granite"):
        check_policy(Policy(scaled.eval()))
    for architecture, backend in itertools.product(ARCHITECTURES, ["dynamic", "static", "transformers"]):
        check_policy(Policy(tiny.policy_model(architecture)), backend)  # type: ignore[arg-type]


def test_check_refuses_a_model_that_counts_its_padding() -> None:
    """BART's decoder by itself has positions of its own, so that rows padded on the left are off."""
    torch.manual_seed(0)
    config = BartConfig(vocab_size=40, d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8)
    model = BartForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20.0)
    with pytest.raises(ModelError, match="rows padded on the left, does not agree"):
        check_policy(Policy(model))


def test_check_accepts_encoder_decoders_of_another_make() -> None:
    """BART adds a bias to its logits; T5 scales its hidden states, or not where its embeddings are not tied."""
    small = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    small |= {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "d_model": 8, "vocab_size": 40}
    bart = BartForConditionalGeneration(BartConfig(**small)).eval()
    torch.nn.init.normal_(bart.final_logits_bias)
    assert bart.final_logits_bias.abs().max() > 0.5
    check_policy(Policy(bart))
    for tied in (True, False):
        shape = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(**shape, tie_word_embeddings=tied, decoder_start_token_id=0))
        check_policy(Policy(model.eval()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_exact_kl_is_what_sampled_log_ratios_estimate(
    architecture: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token, sum p (log p - log q); it is 0 to itself and never negative."""
    policy, reference = (Policy(tiny.policy_model(architecture, seed)) for seed in (0, 1))
    sequences = tiny.sequences(LENGTHS)
    found = exact_kl(policy, reference, 0.7, sequences)
    expected = []
    for i, (start, length) in enumerate(LENGTHS):
        both = [
            (own_logits(one.language_model, sequences.prompts[i, :start], sequences.responses[i, :length]) / 0.7)
            for one in (policy, reference)
        ]
        p, q = (torch.distributions.Categorical(logits=logits) for logits in both)
        expected.append(torch.distributions.kl_divergence(p, q))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert (found > 0.0).all()
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 4 * 3 * 270)  # three tokens at once
    torch.testing.assert_close(exact_kl(policy, reference, 0.7, sequences), found)
    assert exact_kl(policy, policy.as_reference(), 0.7, sequences).max().item() == pytest.approx(0.0, abs=1e-6)
