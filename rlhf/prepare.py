"""The first stage: reads and checks the data, splits it, and makes the tokenizer and model to start from.

What comes out depends on the rows alone, not on their order or on the files that they are in:

* The split of a prompt is decided by the sha256 of its text. So new rows never move old ones to another
  split, and a prompt is in the same split of demonstrations, prompts and preferences, whatever the seed: no
  run is evaluated on a prompt that another run was trained on.
* Rows are written in the order of another part of that hash. ``data.max_*`` keep the first rows in this
  order, so the first N rows of a file are a random sample.

Everything is checked before the first byte is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import torch

from rlhf.errors import DataError
from rlhf.examples import RESPONSES, Examples, read_examples
from rlhf.explain import show
from rlhf.formats import BadRows
from rlhf.models import load_tokenizer, save
from rlhf.random_weights import random_model
from rlhf.tokens import Lengths, context_length, statistics, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.config import Data, PipelineConfig
    from rlhf.context import Context


def run(context: Context) -> dict[str, float]:
    """Write ``<kind>/<split>.parquet``, ``base/`` (only for ``model.init: random``) and ``report.json``.

    Raises:
        DataError: a file cannot be read, a row is bad, or a split that a stage needs is empty.
        ConfigError: the settings of ``data`` or ``model`` do not fit the data.
        ModelError: the tokenizer of the pretrained model cannot be loaded.
    """
    kinds, tokenizer = check(context.config)
    return _write(context, kinds, tokenizer)


def check(config: PipelineConfig) -> tuple[dict[str, Examples], PreTrainedTokenizerBase]:
    """Read and check all data, and make the tokenizer; write nothing.

    Raises:
        InputError: as ``run``.
    """
    kinds = {kind: read_examples(kind, config) for kind in RESPONSES if getattr(config.data, kind)}
    for examples in kinds.values():
        _drop_duplicates(examples, config.data.duplicates)
        _limit(examples, getattr(config.data, f"max_{examples.kind}"))
    _check_splits(kinds, config)
    tokenizer = _tokenizer(kinds, config)
    limit = context_length(config.model)
    lengths = Lengths(tokenizer)
    for examples in kinds.values():
        _drop_too_long(examples, lengths, config.data, limit)
    if "prompts" not in kinds and "demonstrations" in kinds:
        kinds["prompts"] = _prompts_of(kinds["demonstrations"])
        _limit(kinds["prompts"], config.data.max_prompts)
    if "prompts" in kinds and limit is not None:
        _check_room(kinds["prompts"], lengths, config, limit)
    _check_splits(kinds, config)
    for examples in kinds.values():
        examples.tokens = _statistics(examples, lengths)
    return kinds, tokenizer


# --- choosing rows


def _drop_duplicates(examples: Examples, policy: str) -> None:
    names = ("prompt", *RESPONSES[examples.kind])
    first: dict[tuple[str, ...], int] = {}
    bad = BadRows(examples.where, "repeated")
    for row, key in enumerate(zip(*(examples.texts[name] for name in names), strict=True)):
        before = first.setdefault(key, row)
        if before != row:
            place, same = examples.rows.place(row), " and ".join(names)
            bad.add(place, f"has the same {same} as {examples.rows.place(before)}: {show(key[0])}")
    if policy == "error":
        bad.check("Keep one of each, or set data.duplicates: drop.")
    chosen = set(first.values())
    examples.keep([row for row in examples.kept if row in chosen], "duplicate")


def _limit(examples: Examples, most: int | None) -> None:
    examples.keep(examples.kept[:most], "over_limit")


def _prompts_of(demonstrations: Examples) -> Examples:
    """The prompts of the demonstrations, each once, with the response as reference."""
    prompts = demonstrations.texts["prompt"]
    once: dict[str, int] = {}
    for row in demonstrations.kept:
        once.setdefault(prompts[row], row)
    made = Examples(
        kind="prompts",
        rows=demonstrations.rows,
        texts={"prompt": prompts, "reference": demonstrations.texts["response"]},
        used=demonstrations.used,
        kept=demonstrations.kept,
        read=len(demonstrations.kept),
    )
    made.keep(list(once.values()), "duplicate")
    return made


def _check_splits(kinds: Mapping[str, Examples], config: PipelineConfig) -> None:
    """Raise where a split that a stage needs is empty."""
    needed = [(kind, "train") for kind in kinds]
    if config.evaluate.enabled:
        needed.append(("prompts" if "prompts" in kinds else "demonstrations", "test"))
    if config.reward.enabled:
        needed.append(("preferences", "test"))
    for kind, split in needed:
        examples = kinds[kind]
        if not examples.splits(config.data)[split]:
            change = "raise" if split == "test" else "lower"
            lost = "".join(f", {count} {reason}" for reason, count in examples.lost.items() if count)
            raise DataError(
                f"{examples.where}: the {split} split is empty: none of {len(examples.kept)} rows fell into it with "
                f"data.test_fraction {config.data.test_fraction}, as a hash of the prompt decides (rows read: "
                f"{examples.read}{lost}). Give more rows, or {change} data.test_fraction"
            )


# --- tokens


def _tokenizer(kinds: Mapping[str, Examples], config: PipelineConfig) -> PreTrainedTokenizerBase:
    model = config.model
    if model.path is not None:
        return load_tokenizer(model.path, model.revision, model.trust_remote_code)
    return train_tokenizer(_training_texts(kinds, config.data), model.vocab_size, model.context)


def _training_texts(kinds: Mapping[str, Examples], data: Data) -> Iterator[str]:
    for kind, examples in kinds.items():
        for row in examples.splits(data)["train"]:
            for name in ("prompt", *RESPONSES[kind]):
                yield examples.texts[name][row]


def _drop_too_long(examples: Examples, lengths: Lengths, data: Data, limit: int | None) -> None:
    """Drop or refuse rows over ``data.max_*_tokens`` and rows that the model cannot read as a whole."""
    prompts = lengths.of_prompts(examples.column("prompt"))
    responses = {name: lengths.of_responses(examples.column(name)) for name in RESPONSES[examples.kind]}
    longest = np.max(list(responses.values()), axis=0) if responses else np.ones_like(prompts)
    limits = [("prompt", prompts, data.max_prompt_tokens, "data.max_prompt_tokens")]
    limits += [(name, size, data.max_response_tokens, "data.max_response_tokens") for name, size in responses.items()]
    limits.append(("prompt and response", prompts + longest, limit, "the model's context"))
    problems: dict[int, list[str]] = {}
    for what, sizes, most, setting in limits:
        for index in np.flatnonzero(sizes > most) if most is not None else ():
            problem = f"{what}: {sizes[index]} tokens, but {setting} is {most}"
            problems.setdefault(examples.kept[index], []).append(problem)
    if data.too_long == "error":
        bad = BadRows(examples.where, "too long")
        for row in sorted(problems):
            bad.add(examples.rows.place(row), "; ".join(problems[row]))
        bad.check("Shorten these rows, raise the limit, or set data.too_long: drop.")
    examples.keep([row for row in examples.kept if row not in problems], "too_long")


def _check_room(prompts: Examples, lengths: Lengths, config: PipelineConfig, limit: int) -> None:
    """Raise where a prompt leaves too little of the model's context for the responses that are sampled.

    These are never dropped: which rows there are must not depend on settings of later stages.
    """
    rooms = {f"{name}.max_new_tokens": getattr(config, name) for name in ("ppo", "evaluate")}
    on = {setting: stage.max_new_tokens for setting, stage in rooms.items() if stage.enabled}
    if not on:
        return
    setting = max(on, key=lambda name: on[name])
    most = limit - on[setting]
    bad = BadRows(prompts.where, "too long")
    sizes = lengths.of_prompts(prompts.column("prompt")).tolist()
    for row, size in sorted(zip(prompts.kept, sizes, strict=True)):
        if size > most:
            bad.add(
                prompts.rows.place(row),
                f"prompt: {size} tokens, but {most} are left of the model's context {limit} after "
                f"{setting} {on[setting]}",
            )
    bad.check(f"Shorten them, lower {setting}, or set data.max_prompt_tokens: {most} and data.too_long: drop.")


def _statistics(examples: Examples, lengths: Lengths) -> dict[str, dict[str, float]]:
    """Lengths in tokens by column. A response counts its end-of-sequence token."""
    found = {"prompt": statistics(lengths.of_prompts(examples.column("prompt")))}
    for name in examples.texts:
        if name != "prompt":
            found[name] = statistics(lengths.of_responses(examples.column(name)))
    return found


# --- writing


def _write(context: Context, kinds: Mapping[str, Examples], tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    config, finals = context.config, {}
    report: dict[str, Any] = {"vocab_size": len(tokenizer)}
    for kind, examples in kinds.items():
        splits = examples.splits(config.data)
        for split, rows in splits.items():
            path = context.out / kind / f"{split}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(examples.table(rows), path, compression="zstd")
            finals[f"prepare/{kind}_{split}"] = float(len(rows))
        report[kind] = {
            "files": list(getattr(config.data, kind)) or "those of data.demonstrations",
            "rows": examples.read,
            "lost": examples.lost,
            "splits": {split: len(rows) for split, rows in splits.items()},
            "tokens": examples.tokens,
        }
        finals[f"prepare/{kind}_lost"] = float(sum(examples.lost.values()))
    for name, values in _headline(kinds).items():
        finals |= {f"prepare/tokens_{name}_{what}": float(values[what]) for what in ("mean", "p95", "max")}
    finals["prepare/vocab_size"] = float(len(tokenizer))
    if config.model.init == "random":
        torch.manual_seed(config.seed)
        save(random_model(config.model, tokenizer), tokenizer, context.out / "base")
    (context.out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return finals


def _headline(kinds: Mapping[str, Examples]) -> dict[str, dict[str, float]]:
    """Length statistics of the prompts that policies see, and of the responses that they learn from."""
    prompts = kinds.get("prompts") or kinds["preferences"]
    found = {"prompt": prompts.tokens["prompt"]}
    for kind, name in (("preferences", "chosen"), ("demonstrations", "response")):
        if kind in kinds:
            found["response"] = kinds[kind].tokens[name]
    return found
