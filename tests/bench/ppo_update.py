"""Seconds per PPO update of this engine on a fixed workload, as one line of JSON.

One update is a rollout of ``--prompts-per-batch`` prompts, the reference's log-probabilities, values, reward-model
scores, and ``--ppo-epochs`` x ``--minibatches`` optimizer steps, with everything on that a training has: metrics,
checks, token budget. Models have random weights and responses a fixed length. The floor is arithmetic over the peak
rate and bytes over the bandwidth of this machine, whichever is longer, phase by phase (docs/performance.md).

It needs torch, transformers, accelerate and (``--lora``) peft, and no network.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import transformers
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, LlamaConfig

from rlhf.models import adapt
from rlhf.ppo import Policy, Prompts, Settings, Trainer, ValueModel
from rlhf.ppo.policy import zero_head
from rlhf.ppo.rollout import Rollout, per_token
from rlhf.ppo.sequences import Sequences
from rlhf.ppo.summary import peak_memory


class Shape(NamedTuple):
    """A model: family, layers, width, heads, key-value heads, width of the MLP, vocabulary."""

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int


ARCHITECTURES = {
    "gpt2-tiny": Shape("gpt2", 4, 256, 4, 4, 1024, 8192),
    "distilgpt2": Shape("gpt2", 6, 768, 12, 12, 3072, 50257),
    "gpt2": Shape("gpt2", 12, 768, 12, 12, 3072, 50257),
    "gpt2-large": Shape("gpt2", 36, 1280, 20, 20, 5120, 50257),
    "llama-tiny": Shape("llama", 4, 256, 8, 2, 704, 8192),
    "llama-1b": Shape("llama", 16, 2048, 32, 8, 8192, 128256),  # Llama 3.2 1B, tied embeddings
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default="gpt2-tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["fp32", "amp"], default="fp32", help="amp: bf16 autocast, fp32 weights")
    parser.add_argument("--value", choices=["separate", "shared"], default="separate")
    parser.add_argument("--generation", choices=["auto", "dynamic", "static", "transformers"], default="auto")
    for name, default in {
        "prompts-per-batch": 16, "prompt-len": 64, "response-len": 64, "ppo-epochs": 4, "minibatches": 4, "updates": 3,
        "warmup-updates": 1, "lora-rank": 16, "micro-batch-tokens": 16384, "seed": 0, "threads": 0,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--lr", type=float, default=3e-6)
    parser.add_argument("--peak-flops", type=float, help="FLOP/s; default: measured with one matrix product")
    parser.add_argument("--bandwidth", type=float, help="byte/s; default: measured with one copy")
    parser.add_argument("--json", type=Path, help="append the result to this file")
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------------------- models
def build(shape: Shape, kind: Any, seed: int) -> Any:
    """A model with random weights; ids that end or fill a sequence are out of reach, so that lengths are fixed."""
    torch.manual_seed(seed)
    common = {"vocab_size": shape.vocabulary, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config: Any
    if shape.family == "gpt2":
        config = GPT2Config(n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, n_inner=shape.mlp, **common)
    else:
        config = LlamaConfig(
            num_hidden_layers=shape.layers, hidden_size=shape.width, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, intermediate_size=shape.mlp, max_position_embeddings=4096,
            tie_word_embeddings=True, **common,
        )  # fmt: skip
    config.num_labels = 1
    return kind.from_config(config, dtype=torch.float32)


class IdTokenizer:
    """Stands in for a tokenizer: no text is needed where a reward reads token ids. No id ends a response."""

    eos_token_id = -1

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        return [""] * len(rows)


class ScoredTrainer(Trainer):
    """Scores the rollout's own token ids with a reward model, as trainers do whose models share a tokenizer."""

    reward_model: Any

    def ask_rewards(self, rollout: Rollout, update: int) -> tuple[Tensor, dict[str, Tensor]]:
        def last(part: Sequences) -> Tensor:
            ids, _ = part.joined()
            hidden = self.reward_model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            scores = self.reward_model.score(hidden[torch.arange(len(ids)), part.lengths - 1])
            return scores.repeat_interleave(part.response_lengths, dim=0)[:, 0]

        tokens = self.settings.micro_batch_tokens * (4 if self.device.type == "cuda" else 1)
        scores = per_token(last, rollout.sequences, tokens)[:, 0]
        return scores, {"model": scores}


def make_trainer(args: argparse.Namespace, checkpoints: Path) -> ScoredTrainer:
    shape, count = ARCHITECTURES[args.arch], args.prompts_per_batch * (args.warmup_updates + args.updates)
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(shape.vocabulary, (count, args.prompt_len), generator=generator).tolist()
    policy = build(shape, AutoModelForCausalLM, 1)
    value = build(shape, AutoModelForSequenceClassification, 2) if args.value == "separate" else None
    head = zero_head(policy) if value is None else None
    reward = build(shape, AutoModelForSequenceClassification, 3).requires_grad_(False).eval().to(args.device)
    adapt.set_dropout_zero(reward)
    adapt.fuse_gelu(reward)
    trainer = ScoredTrainer(
        settings=Settings(
            updates=args.warmup_updates + args.updates,
            episodes=args.prompts_per_batch,
            epochs=args.ppo_epochs,
            minibatches=args.minibatches,
            micro_batch_tokens=args.micro_batch_tokens,
            max_new_tokens=args.response_len,
            learning_rate=args.lr,
            schedule="constant",
            generation=args.generation,
            value_model=args.value,
        ),
        policy=Policy(adapt.add_lora(policy, args.lora_rank, 2.0 * args.lora_rank) if args.lora else policy, head),
        value_model=None if value is None else ValueModel(value),
        rewards=None,  # type: ignore[arg-type]  (ask_rewards)
        prompts=Prompts([""] * count, ids, {}),
        tokenizer=IdTokenizer(),  # type: ignore[arg-type]
        checkpoints=checkpoints,
        seed=args.seed,
        accelerator=Accelerator(cpu=args.device == "cpu", mixed_precision="bf16" if args.dtype == "amp" else "no"),
    )
    trainer.reward_model = reward
    return trainer


# ---------------------------------------------------------------------------------------------------------------- floor
def floor(args: argparse.Namespace, flops: float, bandwidth: float) -> dict[str, float]:
    """Seconds that each phase of an update cannot go below: the longer of arithmetic and memory traffic.

    B prompts, P and R tokens of prompt and response, S = P + R; E epochs, M minibatches; Nt matrix parameters of the
    trunk, Nh of the output layer, L layers of width d. T new causal tokens after c cached ones cost a sequence
    f(T, c) = 2 T Nt + 4 L d (T c + T^2 / 2) operations. Backward is twice forward, once where weights are frozen
    (LoRA). Weights are read once per pass and decoded token, twice per optimizer step, and each trained number, its
    gradient and its two moments are moved 8 times. Activations and logits are not counted.
    """
    shape = ARCHITECTURES[args.arch]
    layers, d = shape.layers, shape.width
    kv = d // shape.heads * shape.kv_heads
    trunk = layers * (2 * d * d + 2 * d * kv + (2 if shape.family == "gpt2" else 3) * d * shape.mlp)
    head = d * shape.vocabulary
    b, p, r = args.prompts_per_batch, args.prompt_len, args.response_len
    s, epochs, minibatches = p + r, args.ppo_epochs, args.minibatches
    kv_bytes = 2 if args.dtype == "amp" else 4

    def f(new: int, cached: int) -> float:
        return 2 * new * trunk + 4 * layers * d * (new * cached + new * new / 2)

    lora = 0
    if args.lora:
        pairs = (
            [(d, 3 * d), (d, d), (d, shape.mlp), (shape.mlp, d)]
            if shape.family == "gpt2"
            else [(d, d), (d, kv), (d, kv), (d, d), (d, shape.mlp), (d, shape.mlp), (shape.mlp, d)]
        )
        lora = layers * args.lora_rank * sum(a + b for a, b in pairs)
    separate = args.value == "separate"
    attention = 4 * layers * d * s * s / 2
    learn = 3 * (f(s, 0) + 2 * r * head)
    if args.lora:
        learn = 2 * (2 * s * trunk + 2 * r * head) + 3 * attention
    trained = (lora or trunk + head) + (trunk if separate else 0)
    weights, trunk_bytes = 4 * (trunk + head), 4 * trunk
    cache = sum(2 * b * layers * kv * kv_bytes * (p + t) for t in range(1, r))
    moved = 2 * (weights + (trunk_bytes if separate else 0)) + 8 * 4 * trained
    phases = {
        "rollout": (b * (f(p, 0) + 2 * head), weights),
        "decode": (sum(b * (f(1, p + t - 1) + 2 * head) for t in range(1, r)), (r - 1) * weights + cache),
        "reference": (b * (f(s, 0) + 2 * r * head), weights),
        "value": (b * f(s, 0), trunk_bytes) if separate else (0.0, 0),
        "reward": (b * f(s, 0), trunk_bytes),
        "optimise": (epochs * b * (learn + (3 * f(s, 0) if separate else 0)), epochs * minibatches * moved),
    }
    return {name: max(work / flops, traffic / bandwidth) for name, (work, traffic) in phases.items()}


def ceilings(args: argparse.Namespace) -> tuple[float, float]:
    """FLOP/s of a square matrix product and byte/s of a copy, measured where they are not given."""
    cuda = args.device == "cuda"

    def best(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            function()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    flops, bandwidth = args.peak_flops, args.bandwidth
    if flops is None:
        n, dtype = (8192 if cuda else 2048), torch.bfloat16 if args.dtype == "amp" else torch.float32
        a, b = (torch.randn(n, n, device=args.device, dtype=dtype) for _ in range(2))
        flops = 2 * n**3 / best(lambda: a @ b)
    if bandwidth is None:
        x = torch.randn(2**28 if cuda else 2**26, device=args.device)
        y = torch.empty_like(x)
        bandwidth = 2 * x.numel() * 4 / best(lambda: y.copy_(x))
    return flops, bandwidth


# ------------------------------------------------------------------------------------------------------------------ run
def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    seconds: list[float] = []
    found: list[Mapping[str, float]] = []
    with tempfile.TemporaryDirectory() as checkpoints:
        trainer = make_trainer(args, Path(checkpoints))
        trainer.prepare()
        for update in range(1, args.warmup_updates + args.updates + 1):
            if args.device == "cuda" and update == args.warmup_updates + 1:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            found.append(trainer.step(update))
            seconds.append(time.perf_counter() - start)
    seconds, found = seconds[args.warmup_updates :], found[args.warmup_updates :]
    memory = peak_memory()
    bound = floor(args, *(ceiling := ceilings(args)))
    median = statistics.median(seconds)
    names = [name for name in found[0] if name.startswith("ppo/seconds/")]
    result = {
        "engine": f"rlhf.ppo/value={args.value}/generation={args.generation}",
        "arch": args.arch, "device": args.device, "dtype": args.dtype, "lora": args.lora,
        "shape": f"B{args.prompts_per_batch} P{args.prompt_len} R{args.response_len} "
        f"E{args.ppo_epochs} M{args.minibatches}",
        "seconds_per_update": round(median, 4), "seconds_each": [round(x, 4) for x in seconds],
        "breakdown": {n.removeprefix("ppo/seconds/"): round(statistics.median(m[n] for m in found), 4) for n in names},
        "response_tokens_per_second": round(args.prompts_per_batch * args.response_len / median, 1),
        "peak_memory_gb": round(memory / 1e9, 3),
        "floor": {
            "seconds": round(sum(bound.values()), 4), "fraction": round(sum(bound.values()) / median, 4),
            "by_phase": {name: round(value, 4) for name, value in bound.items()},
            "peak_tflops": round(ceiling[0] / 1e12, 3), "bandwidth_gbs": round(ceiling[1] / 1e9, 1),
        },
        "last_metrics": {n: found[-1][f"ppo/{n}"] for n in ("kl", "ratio_max", "value_loss", "grad_norm")},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    line = json.dumps(result)
    print(line)
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
