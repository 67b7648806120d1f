"""A toy pipeline for the trainings: tiny texts, tokenizer and model, and what `prepare` would have written of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from tokenizers import Tokenizer
from transformers import BertConfig, PreTrainedTokenizerFast

from rlhf.config.pipeline import PipelineConfig
from rlhf.context import Context
from rlhf.models import loading
from rlhf.prepare.random_weights import random_model
from rlhf.tracking.stopping import Stop
from rlhf.tracking.tracker import Entry, JournalTracker, Tracker, read_journal

WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]
SMALL: dict[str, Any] = {"batch_size": 8, "learning_rate": 1e-2, "log_every": 2, "checkpoint_every": 2, "epochs": 2}


class Killer(JournalTracker):
    """A tracker that ends the attempt when a step is done, before anything of it is logged or saved."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(path)
        self._step = step

    def progress(self, done: int, total: int, **live: float) -> None:
        if done == self._step:
            raise KeyboardInterrupt


class Asker(JournalTracker):
    """A tracker that asks a training to end, as soon as it tells that a step is done."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(path)
        self.stop = Stop()
        self._step = step

    def progress(self, done: int, total: int, **live: float) -> None:
        self.stop.asked |= done == self._step


def demonstrations() -> list[dict[str, str]]:
    """Prompts of two or three words; the response repeats the first one, more often after longer prompts."""
    texts = [*itertools.permutations(WORDS, 2), *itertools.permutations(WORDS[:5], 3)]
    return [
        {"prompt": " ".join(words) + "\n", "response": " ".join([words[0]] * (len(words) - 1 + i % 3))}
        for i, words in enumerate(texts)
    ]


def preferences() -> list[dict[str, str]]:
    """The chosen text repeats the first word of the prompt, the rejected one the last."""
    pairs = []
    for words in itertools.permutations(WORDS, 2):
        for count in (1, 2):
            chosen, rejected = " ".join(words[:1] * count), " ".join(["no", *words[1:] * count])
            pairs.append({"prompt": " ".join(words) + "\n", "chosen": chosen, "rejected": rejected})
    return pairs


@dataclass(frozen=True)
class Toy:
    """Makes contexts of stages. ``shared`` has the inputs, ``directory`` what a test writes."""

    shared: Path
    directory: Path

    def context(
        self,
        stage: str,
        run: str = "run",
        tracker: Tracker | None = None,
        data: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Context:
        """One attempt at a stage; attempts of the same ``run`` share checkpoints and journal.

        The reward stage trains one model unless ``reward`` says otherwise.
        """
        sections: dict[str, Any] = {
            "seed": 3,
            "data": {"demonstrations": "x.jsonl", "preferences": "x.jsonl", "ratings": "x.jsonl"}
            if data is None
            else data,
            "model": {"init": "random", "layers": 2, "width": 16, "heads": 2, "context": 48, "vocab_size": 270},
            "resources": {"device": "cpu", "threads": 1},
            "ppo": {"max_new_tokens": 8},
            "evaluate": {"max_new_tokens": 8},
        }
        one_model = {"held_out": False} if stage == "reward" else {}
        sections |= {stage: SMALL | one_model | more.pop(stage, {})}
        for name, values in more.items():
            sections[name] = {**sections.get(name, {}), **values} if isinstance(values, Mapping) else values
        place = self.directory / run
        attempt = sum(1 for _ in place.glob("out-*"))
        out, checkpoints = place / f"out-{attempt}", place / "checkpoints"
        out.mkdir(parents=True)
        checkpoints.mkdir(exist_ok=True)
        tracker = tracker or JournalTracker(self.journal(run))
        inputs = {"prepare": self.shared / "prepare", "sft": self.shared / "sft"}
        return Context(stage, PipelineConfig.model_validate(sections), inputs, out, checkpoints, tracker)

    def journal(self, run: str = "run") -> Path:
        """The journal file of a run."""
        return self.directory / run / "metrics.jsonl"

    def killer(self, run: str, step: int) -> Killer:
        """A tracker that ends an attempt at a step."""
        return Killer(self.journal(run), step)

    def asker(self, step: int, run: str = "run") -> Asker:
        """A tracker that asks to end at a step."""
        return Asker(self.journal(run), step)

    def curves(self, run: str = "run") -> list[tuple[int, dict[str, float]]]:
        """What a run logged, without the times."""
        entries: list[Entry] = list(read_journal(self.journal(run)))
        return [(entry.step, entry.values) for entry in entries]


@pytest.fixture(scope="session")
def _inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rlhf.prepare.tokens import train_tokenizer

    torch.set_num_threads(1)
    shared = tmp_path_factory.mktemp("inputs")
    for kind, rows in {"demonstrations": demonstrations(), "preferences": preferences()}.items():
        splits = {
            "test": rows[::8],
            "validation": rows[1::8],
            "train": [row for i, row in enumerate(rows) if i % 8 > 1],
        }
        for split, part in splits.items():
            path = shared / "prepare" / kind / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(part), path)
    texts = [text for row in [*demonstrations(), *preferences()] for text in row.values()]
    tokenizer = train_tokenizer(texts, 270, 48)
    config = Toy(shared, shared / "unused").context("sft").config
    for name in ("prepare/base", "sft/model"):  # both untrained, but not the same
        torch.manual_seed(len(name))
        loading.save(random_model(config.model, tokenizer), tokenizer, shared / name)
    return shared


@pytest.fixture
def toy(_inputs: Path, tmp_path: Path) -> Toy:
    """A toy pipeline; end-of-sequence is its padding too."""
    return Toy(_inputs, tmp_path)


@pytest.fixture(scope="module")
def shared_toy(_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The same for what all tests of a file read, and none of them changes."""
    return Toy(_inputs, tmp_path_factory.mktemp("shared"))


class TinyBert:
    """Makes folders with a small random BERT of a kind, and a tokenizer with [CLS] and [SEP] of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "one", "two", "three", "a", "bb", "ccc", "."]
        tokenizer = Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        self.vocab_size = len(words)

    def __call__(self, kind: Any, **options: Any) -> Path:
        """A folder with a model of this class of transformers."""
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = BertConfig(vocab_size=self.vocab_size, max_position_embeddings=32, pad_token_id=0, **shape, **options)
        model = kind(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5.0)
        path = self._directory / f"bert{sum(1 for _ in self._directory.glob('bert*'))}"
        loading.save(model, self.tokenizer, path)
        return path


@pytest.fixture
def tiny_bert(tmp_path: Path) -> TinyBert:
    """A maker of tiny BERTs."""
    return TinyBert(tmp_path)
