"""Sentiment control on real text: data, reward and measurement for ``sentiment.yaml``.

A small language model continues movie reviews, and PPO makes the continuations negative. The reward reads them with the
language model's own trunk, fine-tuned on one half of the labelled reviews. The judge, a logistic regression over words
and pairs of words, learnt from the other half and is never asked in training. So what exploits one network's blind
spots does not please the judge, and a pile of bad words, which would please it, has no reward of its own.

    python sentiment.py prepare --imdb-train F --imdb-validation F --model DIR --out DIR
    SENTIMENT_DIR=DIR rlhf run sentiment.yaml ...
    python sentiment.py measure --before DIR --after DIR --out DIR

The reviews are Parquet files with the columns text and label (1 is positive). It needs the installed package.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models import adapt, loading
from rlhf.ppo import batching
from rlhf.ppo.policy import Policy, exact_kl
from rlhf.ppo.rollout import collect, per_token

PROMPT_TOKENS = 8
NEW_TOKENS = 48  # ppo.max_new_tokens
TEMPERATURE = 0.7  # ppo.temperature
HELD_OUT = 512
WHOLE_REVIEWS = 500  # on which the reward's accuracy is measured window by window


# --------------------------------------------------------------------------------------------------------------- reward
def negative(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
    """The probability that each continuation is from a negative review.

    Not its log-odds: PPO would raise those for ever, with more and more of the same few words.
    """
    return log_odds(*reward_model(out_folder()), responses).sigmoid().tolist()


def cut(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
    """The share of a continuation's tokens that is not there, since it ended early; 0 for a whole one.

    Without it, PPO finds that a review of one damning sentence is the surest one, at the least KL.
    """
    _, tokenizer = reward_model(out_folder())
    return [max(0.0, 1.0 - len(ids) / NEW_TOKENS) for ids in tokenizer(list(responses))["input_ids"]]


def stale(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
    """The share of a continuation's word pairs that are more than once in the batch.

    Without it, the same sentence (the acting was bad, the plot was bad) ends up in every continuation.
    """
    pairs = [word_pairs(response) for response in responses]
    count = Counter(chain.from_iterable(pairs))
    return [sum(count[pair] > 1 for pair in own) / max(1, len(own)) for own in pairs]


def out_folder() -> Path:
    """Where ``prepare`` wrote."""
    return Path(os.environ["SENTIMENT_DIR"])


@cache
def reward_model(out: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The classifier of the reward and its tokenizer."""
    model = loading.load_reward_model(out / "reward").eval().requires_grad_(False)
    adapt.fuse_gelu(model)
    return model, loading.load_tokenizer(out / "reward")


@torch.no_grad()
def log_odds(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Log-odds (B,) of negative at the last token of each text; an empty text counts as one token."""
    rows = [ids or [tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]
    found = torch.empty(len(rows))
    for part in torch.arange(len(rows)).split(128):
        ids, lengths = batching.pad([rows[row] for row in part.tolist()])
        found[part] = at_every_token(model, ids)[torch.arange(len(ids)), lengths - 1]
    return found


def at_every_token(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-odds (B, T) of negative after each token. Padding is on the right, where causal attention does not look."""
    seen = torch.ones_like(ids)
    hidden = model.base_model(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
    return loading.score_head(model)(hidden)[..., 0]


def train_reward(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    negatives: Tensor,
    passes: int = 2,
    batch: int = 32,
    learning_rate: float = 3e-4,
) -> None:
    """Fine-tune a classifier on random windows as long as a continuation, which it has to read at each of its tokens.

    So it is calibrated on short texts, where a review's label is often not to be seen. ``negatives`` (B,) is 1 where
    review ``rows[b]`` is negative. One pass takes one window of each review.
    """
    adapt.set_dropout_zero(model)
    adapt.fuse_gelu(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    steps = passes * math.ceil(len(rows) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    for _ in range(passes):
        for part in torch.randperm(len(rows)).split(batch):
            ids, lengths = batching.pad([window(rows[row]) for row in part.tolist()])
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            wanted = negatives[part, None].expand_as(mask)
            loss = F.binary_cross_entropy_with_logits(at_every_token(model, ids)[mask], wanted[mask])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def window(row: Sequence[int]) -> Sequence[int]:
    """A random part of a review, as long as a continuation."""
    start = int(torch.randint(max(1, len(row) - NEW_TOKENS + 1), ()))
    return row[start : start + NEW_TOKENS]


# -------------------------------------------------------------------------------------------------------------- prepare
def prepare(args: argparse.Namespace) -> dict[str, float]:
    """Write our half of the reviews, prompts, held-out prompts and both classifiers; return their accuracies."""
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = loading.load_tokenizer(args.model)
    reviews = pd.read_parquet(args.imdb_train).sample(frac=1, random_state=0)
    ours, other = reviews[: len(reviews) // 2], reviews[len(reviews) // 2 :]
    held_out = pd.read_parquet(args.imdb_validation).sample(frac=1, random_state=0)

    ours.to_parquet(args.out / "reviews.parquet", index=False)
    rows, prompts = token_ids(tokenizer, ours), beginnings(tokenizer, ours)
    pd.DataFrame({"prompt": prompts}).to_parquet(args.out / "prompts.parquet")
    new = [prompt for prompt in beginnings(tokenizer, held_out) if prompt not in set(prompts)]
    pd.DataFrame({"prompt": new[:HELD_OUT]}).to_parquet(args.out / "held_out.parquet")

    judge = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, min_df=3, ngram_range=(1, 2)), LogisticRegression(C=10, max_iter=1000)
    )
    judge.fit(other.text, other.label == 0)
    joblib.dump(judge, args.out / "judge.joblib")

    model = loading.reward_from_policy(args.model)
    train_reward(model, rows, torch.tensor((ours.label == 0).to_numpy(), dtype=torch.float32))
    loading.save(model, tokenizer, args.out / "reward")
    return accuracies(judge, model.eval(), tokenizer, held_out)


def token_ids(tokenizer: PreTrainedTokenizerBase, reviews: pd.DataFrame) -> list[list[int]]:
    """Token ids of the reviews."""
    found: list[list[int]] = tokenizer(reviews.text.tolist(), verbose=False)["input_ids"]
    return found


def beginnings(tokenizer: PreTrainedTokenizerBase, reviews: pd.DataFrame) -> list[str]:
    """The first tokens of the reviews as text, each beginning once."""
    return list(dict.fromkeys(tokenizer.batch_decode([ids[:PROMPT_TOKENS] for ids in token_ids(tokenizer, reviews)])))


def accuracies(
    judge: Pipeline, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reviews: pd.DataFrame
) -> dict[str, float]:
    """Shares of held-out reviews, and of windows of them as long as a continuation, that the classifiers know.

    The reward reads a whole review as the mean over its windows, and only the first ``WHOLE_REVIEWS`` of them.
    """
    truth, rows = (reviews.label == 0).to_numpy(), token_ids(tokenizer, reviews)
    windows = tokenizer.batch_decode([window(row) for row in rows])
    parts = [
        tokenizer.batch_decode([row[start : start + NEW_TOKENS] for start in range(0, len(row), NEW_TOKENS)])
        for row in rows[:WHOLE_REVIEWS]
    ]
    odds = log_odds(model, tokenizer, [text for part in parts for text in part]).split([len(part) for part in parts])
    whole = torch.stack([part.mean() for part in odds]).numpy()
    return {
        "judge_accuracy": float((judge.predict(reviews.text) == truth).mean()),
        "judge_accuracy_windows": float((judge.predict(windows) == truth).mean()),
        "reward_accuracy": float(((whole > 0) == truth[:WHOLE_REVIEWS]).mean()),
        "reward_accuracy_windows": float(((log_odds(model, tokenizer, windows).numpy() > 0) == truth).mean()),
    }


# -------------------------------------------------------------------------------------------------------------- measure
def measure(args: argparse.Namespace) -> dict[str, float]:
    """Both policies on the held-out prompts; the texts go to ``samples.jsonl`` beside ``--out``'s other files."""
    prompts = pd.read_parquet(args.out / "held_out.parquet").prompt.tolist()
    tokenizer = loading.load_tokenizer(args.before)
    before, after = (Policy(loading.load_policy(path).eval()) for path in (args.before, args.after))
    texts = {"before": continue_all(before, before, tokenizer, prompts)[0]}
    texts["after"], kl = continue_all(after, before, tokenizer, prompts)
    pd.DataFrame({"prompt": prompts, **texts}).to_json(args.out / "samples.jsonl", orient="records", lines=True)

    judge: Pipeline = joblib.load(args.out / "judge.joblib")
    result: dict[str, float] = {"prompts": len(prompts)}
    for name, responses in texts.items():
        share = float(judge.predict(responses).mean())
        result[f"negative_{name}"] = share
        result[f"negative_{name}_se"] = math.sqrt(share * (1 - share) / len(prompts))
        result[f"distinct_2_{name}"] = distinct_2(responses)
        result[f"reward_{name}"] = float(log_odds(*reward_model(args.out), responses).sigmoid().mean())
    result["distinct_2_ratio"] = result["distinct_2_after"] / result["distinct_2_before"]
    return result | {"kl": kl.mean().item(), "kl_se": kl.std().item() / math.sqrt(len(kl))}


@torch.no_grad()
def continue_all(
    policy: Policy, reference: Policy, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> tuple[list[str], Tensor]:
    """A sampled continuation of each prompt, and the exact KL to the reference in nats per sequence (B,)."""
    ids = loading.prompt_token_ids(tokenizer, prompts)
    uniforms = torch.rand(len(prompts), NEW_TOKENS, generator=torch.Generator().manual_seed(0))
    rows = batching.Prompts(prompts, ids, {})
    made = collect(policy, tokenizer, rows, uniforms, TEMPERATURE, torch.device("cpu"))
    kl = per_token(lambda part: exact_kl(policy, reference, TEMPERATURE, part), made.sequences, 8192)
    return made.responses, kl.sum(1)


def distinct_2(texts: Sequence[str]) -> float:
    """Different pairs of neighbouring words, as a share of all pairs."""
    pairs = [pair for text in texts for pair in word_pairs(text)]
    return len(set(pairs)) / len(pairs)


def word_pairs(text: str) -> list[tuple[str, str]]:
    """Pairs of neighbouring words."""
    return list(pairwise(text.split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function, folders in (
        (prepare, ("--imdb-train", "--imdb-validation", "--model")),
        (measure, ("--before", "--after")),
    ):
        command = commands.add_parser(function.__name__, help=(function.__doc__ or "").partition("\n")[0])
        command.set_defaults(function=function)
        for name in (*folders, "--out"):
            command.add_argument(name, type=Path, required=True)
    args, start = parser.parse_args(), time.perf_counter()
    found = args.function(args) | {"seconds": time.perf_counter() - start}
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
