"""Built-in rewards that ask a model, which loads at their first call: on CUDA where there is one, in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.rewards.builtin import reference_texts
from rlhf.rewards.registry import builtin

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS_AT_ONCE = 64  # of a forward pass


class Loaded(NamedTuple):
    """A model with its tokenizer; texts are cut to ``limit`` tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    limit: int | None


@builtin("torch", "transformers", "tokenizers")
def semantic_similarity(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    model: str,
    column: str = "reference",
    **columns: Sequence[Any],
) -> list[float]:
    """Cosine of the embeddings of response and the text in ``column``, in [-1, 1]; 0 for an empty response.

    ``model`` is a local or hub sentence encoder. An embedding is the mean of its last hidden states over the real
    tokens (Reimers and Gurevych 2019).
    """
    import torch

    references = reference_texts(columns, column)
    encoder = _load("AutoModel", model)
    ours, theirs = (_read(encoder, texts, _mean_pooled) for texts in (responses, references))
    similar = torch.cosine_similarity(ours, theirs)
    return [value if response.strip() else 0.0 for value, response in zip(similar.tolist(), responses, strict=True)]


@builtin("torch", "transformers", "tokenizers")
def sentiment(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    model: str,
    label: str | int,
    with_prompt: bool = False,
    **columns: Sequence[Any],
) -> list[float]:
    """Probability of ``label`` by the classifier ``model``, in [0, 1].

    ``label`` is one of the names in the classifier's configuration, in any case, or its number. It reads the response,
    ``with_prompt`` prompt and response.
    """
    classifier = _load("AutoModelForSequenceClassification", model)
    index = _label(classifier.model.config, label, model)
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    logits = _read(classifier, texts if with_prompt else responses, lambda made, mask: made.logits)
    found: list[float] = logits.softmax(-1)[:, index].tolist()
    return found


def _read(loaded: Loaded, texts: Sequence[str], take: Callable[[Any, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What ``take`` keeps (n, ...) of the model's outputs for n texts and their masks (n, T)."""
    import torch

    device = loaded.model.device
    cut: dict[str, Any] = {} if loaded.limit is None else {"truncation": True, "max_length": loaded.limit}
    found = []
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for start in range(0, len(texts), ROWS_AT_ONCE):
            rows = loaded.tokenizer(list(texts[start : start + ROWS_AT_ONCE]), padding=True, return_tensors="pt", **cut)
            ids, mask = rows["input_ids"].to(device), rows["attention_mask"].to(device)
            found.append(take(loaded.model(input_ids=ids, attention_mask=mask), mask).float().cpu())
    return torch.cat(found)


def _mean_pooled(made: Any, mask: torch.Tensor) -> torch.Tensor:
    """Mean (n, width) of the last hidden states (n, T, width) over the real tokens."""
    real = mask[..., None].to(made.last_hidden_state.dtype)
    pooled: torch.Tensor = (made.last_hidden_state * real).sum(1) / real.sum(1).clamp(min=1.0)
    return pooled


@lru_cache(maxsize=4)
def _load(kind: str, path: str) -> Loaded:
    """A model of a kind of transformers.

    Raises:
        ModelError: it cannot be loaded, or lacks weights.
    """
    import torch
    import transformers

    from rlhf.errors import ModelError
    from rlhf.models.score_input import usable_length

    with torch.random.fork_rng(devices=[]):  # a model that loads late must not move the draws of a training
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            model, info = getattr(transformers, kind).from_pretrained(
                path, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ModelError(
                f"the model {path!r} cannot be loaded: {type(error).__name__}: {reason}; "
                "the argument `model` is a local directory (./name) or a hub id"
            ) from error
    if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key or kind != "AutoModel"):
        raise ModelError(f"the model {path!r} has no weights for {', '.join(missing[:5])}: it is of another kind")
    if model.config.is_encoder_decoder and kind == "AutoModel":
        model = model.get_encoder()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
    return Loaded(model, tokenizer, usable_length(model))


def _label(config: Any, label: str | int, model: str) -> int:
    names: Mapping[int, str] = config.id2label
    if config.num_labels < 2:
        raise ValueError(f"the classifier {model!r} has one output, so it gives no probability of a label")
    for index, name in names.items():
        if label == index or (isinstance(label, str) and label.lower() == name.lower()):
            return int(index)
    known = ", ".join(f"{name} ({index})" for index, name in names.items())
    raise ValueError(f"the classifier {model!r} has no label {label!r}; it has {known}")
