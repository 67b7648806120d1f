"""The first stage: reads and checks the data, splits it, and makes the tokenizer and model to start from.

What comes out depends on the rows alone, not on their order or on the files that they are in (``rlhf.prepare.settle``).
The data streams through files in ``context.checkpoints``; everything is checked before the first file is published.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from rlhf.config.data import KINDS
from rlhf.errors import DataError
from rlhf.models.loading import load_tokenizer, save
from rlhf.prepare import chat
from rlhf.prepare.problems import Quarantine
from rlhf.prepare.random_weights import random_model
from rlhf.prepare.reading import Reading
from rlhf.prepare.settle import Settled, Stated, settle
from rlhf.prepare.sizing import Sized, check_room, prompts_of, write
from rlhf.prepare.tokens import context_length, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.config.pipeline import PipelineConfig
    from rlhf.context import Context

TOKENIZER_ROWS = 200_000  # of each kind, that a tokenizer is trained on; they are a random sample
BAD_ROWS = "bad_rows.jsonl"


class Checked(NamedTuple):
    """Data that is as it must be, in files, and the tokenizer for it."""

    kinds: dict[str, Sized]
    tokenizer: PreTrainedTokenizerBase


def run(context: Context) -> dict[str, float]:
    """Write ``<kind>/<split>.parquet``, ``base/`` (only for ``model.init: random``) and ``report.json``.

    Labelled texts become ``preferences``. With ``data.bad_rows: skip`` the rows that were skipped are in
    ``bad_rows.jsonl``.

    Raises:
        DataError: a file cannot be read, a row is bad, or a split that a stage needs is empty.
        ConfigError: the settings of ``data`` or ``model`` do not fit the data.
        ModelError: the tokenizer of the pretrained model cannot be loaded.
    """
    config = context.config
    with _folder(context.checkpoints / "prepare") as folder:
        checked = prepare(config, folder)
        finals = _finals(checked)
        for path in sorted((folder / "out").iterdir()):
            shutil.move(path, context.out / path.name)
    if config.model.init == "random":
        torch.manual_seed(config.seed)
        save(random_model(config.model, checked.tokenizer), checked.tokenizer, context.out / "base")
    report = {"vocab_size": len(checked.tokenizer)} | {kind: sized.report() for kind, sized in checked.kinds.items()}
    (context.out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return finals


def check(config: PipelineConfig) -> Checked:
    """Read and check all data, and make the tokenizer; what is written meanwhile is deleted.

    Raises:
        InputError: as ``run``.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-check-") as folder:
        return prepare(config, Path(folder))


def prepare(config: PipelineConfig, folder: Path) -> Checked:
    """Everything but the model: the files are written to ``folder/out``."""
    (folder / "out").mkdir(parents=True)
    kinds = _settled(config, folder)
    _check_splits(kinds, config)
    tokenizer = _tokenizer(kinds, config)
    limit = context_length(config.model)
    sized: dict[str, Sized] = {}
    for kind, settled in kinds.items():
        sized[kind] = write(settled, tokenizer, config.data, limit, folder)
    if "prompts" not in kinds and "demonstrations" in kinds:
        prompts = prompts_of(sized["demonstrations"], config.data, folder)
        sized["prompts"] = write(prompts, tokenizer, config.data, limit, folder)
    _check_splits(sized, config)
    if "prompts" in sized and limit is not None:
        check_room(sized["prompts"], config, limit)
    return Checked(sized, tokenizer)


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """A folder for what is needed meanwhile; what a killed attempt left is deleted."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _settled(config: PipelineConfig, folder: Path) -> dict[str, Settled]:
    """All rows, read and checked, and those of them that stay."""
    data = config.data

    @cache
    def template() -> chat.Template:
        return chat.make_template(data.chat, _pretrained_tokenizer(config) if config.model.path else None)

    quarantine = Quarantine(folder / "out" / BAD_ROWS) if data.bad_rows == "skip" else None
    readings = [
        Reading(kind, config, folder / f"{kind}.spool", template, quarantine) for kind in KINDS if data.has(kind)
    ]
    spools = [reading.read() for reading in readings]
    stated, found = Stated(readings), {}
    for reading, spool in zip(readings, spools, strict=True):
        settled = settle(reading, spool, stated, data, folder / f"{reading.kind}.settled")
        settled.lost.update(reading.bad.skipped)
        found[reading.kind] = settled
    return found


def _check_splits(kinds: Mapping[str, Settled | Sized], config: PipelineConfig) -> None:
    """Raise where a split that a stage needs is empty."""
    needed = [(kind, "train") for kind in kinds]
    prompts = "prompts" if "prompts" in kinds else "demonstrations"
    if config.evaluate.enabled:
        needed.append((prompts, "test"))
    if config.ppo.enabled and config.ppo.eval_every:
        needed.append((prompts, "validation"))
    if config.reward.enabled:
        needed += [(kind, "test") for kind in ("preferences", "labelled", "ratings") if kind in kinds]
    for kind, split in needed:
        found = kinds[kind]
        if not found.splits[split]:
            lost = "".join(f", {count} {reason}" for reason, count in found.lost.items() if count)
            raise DataError(
                f"{found.where}: the {split} split is empty: none of {found.kept} rows fell into it with "
                f"data.validation_fraction {config.data.validation_fraction} and data.test_fraction "
                f"{config.data.test_fraction}, as a hash of the prompt decides where a source does not say its split "
                f"(rows read: {found.read}{lost}). Give more rows, or {_CHANGES[split]}"
            )


_CHANGES = {
    "train": "lower data.test_fraction",
    "validation": "raise data.validation_fraction, or set ppo.eval_every: 0",
    "test": "raise data.test_fraction",
}


def _pretrained_tokenizer(config: PipelineConfig) -> PreTrainedTokenizerBase:
    model = config.model
    return load_tokenizer(str(model.path), model.revision, model.trust_remote_code)


def _tokenizer(kinds: Mapping[str, Settled], config: PipelineConfig) -> PreTrainedTokenizerBase:
    model = config.model
    if model.path is not None:
        return _pretrained_tokenizer(config)
    texts = (text for settled in kinds.values() for text in settled.training_texts(TOKENIZER_ROWS))
    return train_tokenizer(texts, model.vocab_size, model.context)


def _finals(checked: Checked) -> dict[str, float]:
    finals: dict[str, float] = {}
    for kind, sized in checked.kinds.items():
        finals |= {f"prepare/{sized.folder}_{split}": float(count) for split, count in sized.splits.items()}
        finals[f"prepare/{kind}_lost"] = float(sum(sized.lost.values()))
    for name, values in _headline(checked.kinds).items():
        finals |= {f"prepare/tokens_{name}_{what}": float(values[what]) for what in ("mean", "p95", "max")}
    finals["prepare/vocab_size"] = float(len(checked.tokenizer))
    return finals


def _headline(kinds: Mapping[str, Sized]) -> dict[str, dict[str, float]]:
    """Length statistics of the prompts that policies see, and of the responses that they learn from."""
    prompts = next(kinds[kind] for kind in ("prompts", "preferences", "ratings", "labelled") if kind in kinds)
    found = {"prompt": prompts.tokens["prompt"]} if "prompt" in prompts.tokens else {}
    for kind, name in (("labelled", "text"), ("ratings", "response"), ("preferences", "chosen"),
                       ("preferences", "responses"), ("demonstrations", "response")):  # fmt: skip
        if kind in kinds and name in kinds[kind].tokens:
            found["response"] = kinds[kind].tokens[name]
    return found
