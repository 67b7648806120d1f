"""The model that MLflow serves: MLflow copies this one file beside a Hugging Face directory, and runs it from there.

So it imports nothing of this project. ``mlflow.pyfunc.load_model(...).predict(data, params)`` takes a table with a
column ``prompt`` (or a list of texts) and gives

- for a language model, a list of responses; ``params`` are those of ``GENERATION``.
- for a reward model, a list of scores, normalised as in training; the table has a column ``response`` too, or the one
  column ``text``. ``params`` are those of ``SCORING``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow

SCORING = {"batch_size": 32}
GENERATION = {
    "max_new_tokens": 64,
    "temperature": 0.0,  # 0: the likeliest token each time
    "top_p": 1.0,
    "top_k": 0,  # 0: all tokens
    "seed": -1,  # of sampling; -1: another one each time
    "batch_size": 32,
}


class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow is not typed
    """A policy (causal or encoder-decoder) or a reward model, by the architecture that its config.json names.

    A type hint on ``model_input`` would make MLflow drop ``params``; the attribute below spares users a warning that
    there is none.
    """

    _skip_type_hint_validation = True

    def load_context(self, context: Any) -> None:
        """Load the model, on the GPU where there is one."""
        import torch
        import transformers as hf

        directory = context.artifacts["model"]
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
        self.scores = is_reward_model(config)
        self.encoder_decoder = not self.scores and bool(config.get("is_encoder_decoder", False))
        if self.scores:
            kind = hf.AutoModelForSequenceClassification
        else:
            kind = hf.AutoModelForSeq2SeqLM if self.encoder_decoder else hf.AutoModelForCausalLM
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = kind.from_pretrained(directory, local_files_only=True).to(device).eval()
        self.tokenizer = hf.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self.tokenizer.eos_token = self.tokenizer.eos_token or self.tokenizer.sep_token
        self.eos = int(self.tokenizer.eos_token_id)

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Responses, or scores: one for each row, in their order.

        Raises:
            ValueError: a column is missing, or a row is too long for the model.
        """
        import torch

        options = {**(SCORING if self.scores else GENERATION), **(params or {})}
        size = int(options["batch_size"])
        rows = _texts_to_score(model_input) if self.scores else _column(model_input, "prompt")
        one_batch = self._score if self.scores else self._generate
        with torch.inference_mode(), torch.random.fork_rng():
            if options.get("seed", -1) >= 0:
                torch.manual_seed(options["seed"])
            return [item for i in range(0, len(rows), size) for item in one_batch(rows[i : i + size], options)]

    def _generate(self, prompts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        new = int(options["max_new_tokens"])
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        sampling = {"do_sample": False}
        if options["temperature"] > 0.0:
            sampling = {"do_sample": True, **{name: options[name] for name in ("temperature", "top_p", "top_k")}}
        tokens = self.model.generate(
            **self._padded(ids, left=not self.encoder_decoder, room_for=0 if self.encoder_decoder else new),
            **sampling,
            max_new_tokens=new,
            eos_token_id=self.eos,
            pad_token_id=self.eos,
        )
        start = 0 if self.encoder_decoder else max(map(len, ids))
        responses: list[str] = self.tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
        return responses

    def _score(self, texts: Sequence[str], options: Mapping[str, Any]) -> list[float]:
        """(logit - score_mean) / score_std, read at the end-of-sequence that ends every text, as in training.

        Encoders and T5 add their end themselves, and get no second one.
        """
        ends = {self.eos, self.tokenizer.sep_token_id}
        texts = [text.removesuffix(self.tokenizer.eos_token) for text in texts]
        bare: list[list[int]] = self.tokenizer(texts)["input_ids"]
        ids = [row if row and row[-1] in ends else [*row, self.eos] for row in bare]
        config = self.model.config
        config.pad_token_id = self._filler  # a causal classifier reads the last token that is not this
        logits = self.model(**self._padded(ids, left=False)).logits[:, 0].float()
        scores: list[float] = (
            (logits - getattr(config, "score_mean", 0.0)) / getattr(config, "score_std", 1.0)
        ).tolist()
        return scores

    def _prompt_ids(self, prompt: str) -> list[int]:
        """As in training: no special tokens, but a beginning-of-sequence where the tokenizer adds one.

        An encoder gets all that its tokenizer adds.
        """
        full: list[int] = self.tokenizer(prompt)["input_ids"]
        plain: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        if self.encoder_decoder:
            return full
        return [bos, *plain] if bos is not None and full[:1] == [bos] != plain[:1] else plain

    @property
    def _filler(self) -> int:
        """A token to pad with that does not end a text; masks come from lengths, so it may be any."""
        return 1 if self.eos == 0 else 0

    def _padded(self, rows: Sequence[Sequence[int]], left: bool, room_for: int = 0) -> dict[str, Any]:
        """``input_ids`` and ``attention_mask``, both (B, longest row)."""
        import torch

        limit = getattr(self.model.config, "max_position_embeddings", None)
        longest = max(map(len, rows))
        if limit is not None and longest + room_for > limit:
            raise ValueError(
                f"a text has {longest} tokens, and {room_for} new ones may follow; the model takes {limit} in all: "
                "shorten the text, or lower max_new_tokens"
            )
        ids, mask = torch.full((len(rows), longest), self._filler), torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), None) if left else slice(len(row))
            ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.long), 1
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}


def is_reward_model(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a model that scores, rather than one that writes."""
    return str(config["architectures"][0]).endswith("ForSequenceClassification")


def _texts_to_score(data: Any) -> list[str]:
    columns = list(getattr(data, "columns", ["text"]))
    if "text" in columns:
        return _column(data, "text")
    if "prompt" in columns and "response" in columns:
        prompts, responses = _column(data, "prompt"), _column(data, "response")
        return [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    raise ValueError(f"a reward model scores the columns prompt and response, or text; given: {columns}")


def _column(data: Any, name: str) -> list[str]:
    """A column of a table as texts; a list of texts, or a table of one column, has any name."""
    if not hasattr(data, "columns"):
        return [data] if isinstance(data, str) else [str(item) for item in data]
    if name not in data.columns:
        if len(data.columns) > 1:
            raise ValueError(f"there is no column {name!r}; given: {list(data.columns)}")
        name = data.columns[0]
    return [str(item) for item in data[name]]


mlflow.models.set_model(ServedModel())
