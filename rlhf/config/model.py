"""The section ``model``: the policy before any training, and how its weights are kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.fields import NUMBERS_SAME, Count, Positive, Section
from rlhf.models.dtypes import Dtype


class Model(Section):
    """The policy before any training: a pretrained model, or random weights."""

    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="`pretrained` loads model.path; `random` starts from random weights."
    )
    path: str | None = Field(None, description="Local directory or hub id of the pretrained model.")
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit) of model.path.")
    architecture: Literal["gpt2", "gpt_bigcode", "llama", "falcon", "t5"] = Field(
        "gpt2", description="Architecture when init is random; t5 is an encoder-decoder."
    )
    layers: Count = Field(
        4, description="Transformer blocks when init is random; of t5's encoder and of its decoder, each."
    )
    width: Count = Field(128, description="Hidden size when init is random.")
    heads: Count = Field(4, description="Attention heads when init is random.")
    context: Count = Field(256, description="Longest sequence, in tokens, when init is random.")
    vocab_size: Annotated[int, Field(ge=257)] = Field(
        2048, description="Most entries of the byte-level BPE vocabulary that prepare trains when init is random."
    )
    lora_rank: Annotated[int, Field(ge=0)] = Field(0, description="Rank of the LoRA adapters; 0 trains all weights.")
    lora_alpha: Positive = Field(32.0, description="LoRA scaling numerator (scale = alpha / rank).")
    dtype: Dtype = Field(
        "float32",
        description="Type of frozen weights: of the models under LoRA adapters, of the reference, and of what only "
        "scores or is evaluated. Weights that learn are float32, as is what is saved.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: less memory, slower.",
        json_schema_extra=NUMBERS_SAME,
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with a hub model.")

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.init == "pretrained" and not self.path:
            raise ValueError(
                "init is `pretrained`, so path must name a local directory or a hub id; or set init: random"
            )
        if self.init == "random" and self.path:
            raise ValueError(f"init is `random`, so path ({self.path!r}) must not be set; or set init: pretrained")
        if self.init == "random" and self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self
