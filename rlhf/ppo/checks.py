"""What is looked at before a training: that settings and models go together, and that PPO knows the model.

It knows one whose own logits it makes from hidden states, and whose decoding agrees with a plain forward pass.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rlhf.config.ppo_options import Generation, Settings
from rlhf.errors import ConfigError, ModelError
from rlhf.ppo.generation import generate
from rlhf.ppo.policy import Policy, ValueModel, shifted
from rlhf.ppo.sequences import Sequences, unpack


def check_settings(settings: Settings, policy: Policy, value_model: ValueModel | None, processes: int) -> None:
    """See that the settings suit the models and the number of processes.

    Raises:
        ConfigError: they do not.
    """
    s = settings
    if s.episodes % (processes * s.minibatches):
        raise ConfigError(
            f"ppo.episodes {s.episodes} must be a multiple of processes * minibatches = {processes} * {s.minibatches}"
        )
    shared = s.value_model == "shared"
    if (policy.value_head is not None, value_model is None) != (shared, shared):
        raise ConfigError(
            f"ppo.value_model is `{s.value_model}`: `separate` needs a value model and a policy without a value "
            "head, `shared` a policy with one and no value model"
        )


@torch.no_grad()
def check_policy(policy: Policy, backend: Generation = "auto") -> None:
    """Try a policy on a few tokens.

    Raises:
        ModelError: an architecture makes its logits in a way of its own (it scales them, say), or does not read the
            positions that left padding needs.
    """
    model = policy.language_model
    device, kind = model.device, model.config.model_type
    ids = torch.arange(1, 9, device=device)[None] % min(model.config.vocab_size, 97)
    four = torch.tensor([4], device=device)
    own = _own_logprobs(policy, Sequences(ids[:, :4], four, ids[:, 4:], four))
    close = partial(torch.allclose, rtol=1e-2, atol=1e-2 if model.dtype == torch.float32 else 0.3)  # logits in bf16
    if not close(policy(Sequences(ids[:, :4], four, ids[:, 4:], four), 1.0).logprobs, own):
        raise ModelError(
            f"PPO does not know how a {kind} model makes its logits from hidden states; take another model.path, or "
            "extend Policy.logits"
        )
    prompts, lengths = ids[:, :4].repeat(2, 1), torch.tensor([4, 2], device=device)
    uniforms = torch.linspace(0.1, 0.9, 6, device=device).view(2, 3)
    made = generate(policy, prompts, lengths, uniforms, 1.0, -1, backend)
    sequences = Sequences(prompts, lengths, made.responses, made.lengths)
    if not close(made.logprobs, unpack(policy(sequences, 1.0).logprobs, sequences.mask)):
        raise ModelError(
            f"decoding with a {kind} model, rows padded on the left, does not agree with its forward pass; set "
            f"ppo.generation to `transformers` (it is `{backend}`), or take another model.path"
        )


def _own_logprobs(policy: Policy, sequences: Sequences) -> Tensor:
    """Log-probabilities (T,) of one row's response, by the model's own forward."""
    model, (prompts, _, responses, _) = policy.language_model, sequences
    if model.config.is_encoder_decoder:
        logits = model(input_ids=prompts, decoder_input_ids=shifted(model, sequences)).logits[0]
    else:
        whole = torch.cat([prompts, responses], dim=1)
        logits = model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0, prompts.shape[1] - 1 : -1]
    found: Tensor = logits.float().log_softmax(-1).gather(1, responses[0, :, None])[:, 0]
    return found
