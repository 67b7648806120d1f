"""Answers with the asked number of words, on real text: data and measurement for ``word-count.yaml``.

A prompt asks for a number of words and gives the beginning of a sentence of a movie review; the policy goes on. SFT
learns from sentences, asked for at the length that they have, that an answer ends; PPO, with the rule
``exact_word_count`` as reward, learns to count. In PPO and in the measurement the numbers are drawn evenly, and the
sentences are of other reviews.

    python word_count.py prepare --imdb-train F --imdb-validation F --out OUT
    rlhf run word-count.yaml --set data.demonstrations=OUT/demonstrations.parquet \\
        --set data.prompts=OUT/prompts.parquet --set model.path=DIR
    python word_count.py measure --samples EVALUATE/samples.parquet

The reviews are Parquet files with the column text; EVALUATE is the artifact of the evaluate stage, which
``rlhf run --json`` names.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import numpy as np
import pandas as pd

from rlhf.metrics.word_count import word_count
from rlhf.rewards.builtin import exact_word_count

OPENING = 3  # words of a sentence that the prompt gives
TARGETS = range(5, 17)  # words that are asked for
DEMONSTRATED = range(2, 25)  # words of the demonstrated answers
PER_REVIEW = 3  # sentences
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_ASKED = re.compile(r"(\d+) words")  # in the prompt, as word-count.yaml writes it


def sentences(reviews: pd.Series, number: int, draw: random.Random) -> list[tuple[str, str]]:
    """Opening and rest of some sentences of each review, no opening twice with the same rest."""
    found: dict[tuple[str, str], None] = {}
    for review in reviews:
        words = [sentence.split(" ") for sentence in _SENTENCE_END.split(review) if "\n" not in sentence]
        long = [sentence for sentence in words if len(sentence) > OPENING and all(sentence)]
        for sentence in draw.sample(long, min(number, len(long))):
            found[" ".join(sentence[:OPENING]), " " + " ".join(sentence[OPENING:])] = None
    return list(found)


def prepare(args: argparse.Namespace) -> dict[str, float]:
    """Write demonstrations (prompt, response, target_words) and prompts (prompt, target_words)."""
    draw = random.Random(0)
    args.out.mkdir(parents=True, exist_ok=True)
    train, other = (pd.read_parquet(path).text for path in (args.imdb_train, args.imdb_validation))
    rows = [(*pair, word_count(pair[1])) for pair in sentences(train, PER_REVIEW, draw)]
    rows = [row for row in rows if row[2] in DEMONSTRATED]
    made = pd.DataFrame(rows, columns=["prompt", "response", "target_words"])
    made.to_parquet(args.out / "demonstrations.parquet", index=False)
    openings = dict.fromkeys(opening for opening, _ in sentences(other, PER_REVIEW, draw))
    asked = pd.DataFrame({"prompt": list(openings)})
    asked["target_words"] = [draw.choice(TARGETS) for _ in openings]
    asked.to_parquet(args.out / "prompts.parquet", index=False)
    return {"demonstrations": len(made), "prompts": len(asked)}


def measure(args: argparse.Namespace) -> dict[str, float]:
    """How the lengths of the answers of both policies compare with what was asked for."""
    samples = pd.read_parquet(args.samples)
    asked = np.array([int(_ASKED.search(prompt)[1]) for prompt in samples.prompt])  # type: ignore[index]
    found: dict[str, float] = {"prompts": len(samples), "different_targets": len(set(asked))}
    for policy in ("sft", "ppo"):
        given = np.array([word_count(text) for text in samples[policy]])
        rewards = exact_word_count(samples.prompt, samples[policy], target_words=asked)
        found[f"reward_{policy}"] = float(np.mean(rewards))
        found[f"exact_{policy}"] = float((given == asked).mean())
        found[f"off_by_one_at_most_{policy}"] = float((abs(given - asked) <= 1).mean())
        found[f"correlation_{policy}"] = float(np.corrcoef(asked, given)[0, 1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function, paths in (
        (prepare, ("--imdb-train", "--imdb-validation", "--out")),
        (measure, ("--samples",)),
    ):
        command = commands.add_parser(function.__name__, help=(function.__doc__ or "").partition("\n")[0])
        command.set_defaults(function=function)
        for name in paths:
            command.add_argument(name, type=Path, required=True)
    args = parser.parse_args()
    print(json.dumps({name: round(value, 4) for name, value in args.function(args).items()}))


if __name__ == "__main__":
    main()
