"""The schema of the whole pipeline.

One set of pydantic models is the YAML file, the ``--set ppo.kl_coef=0.1`` of the command line and the form of the
Prefect UI. All models are frozen and refuse unknown keys. Every field says its unit. A field marked ``NUMBERS_SAME``
changes how a stage computes, not what: it is not part of the stage's cache key.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, create_model, model_validator

from rlhf.ppo import settings as ppo_settings

NUMBERS_SAME: dict[str, JsonValue] = {"in_cache_key": False}
BY_CONTENT: dict[str, JsonValue] = {"in_cache_key": False}  # a path: what lies there is hashed into the key instead


def _as_tuple(value: Any) -> Any:
    """One path may be written without a list."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


Files = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class OptionalStage(Section):
    """A stage that can be left out: ``sft: off`` is short for ``sft: {enabled: false}``."""

    enabled: bool = Field(True, description="Whether the stage is part of the pipeline.")

    @model_validator(mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        if value is False or value == "off":  # YAML 1.1 reads a bare `off` as false
            return {"enabled": False}
        if value is True or value == "on":
            return {}
        return value


class Columns(Section):
    """Names of the columns in the user's files."""

    prompt: str = Field("prompt", min_length=1, description="Column with the prompt.")
    response: str = Field("response", min_length=1, description="Column with the demonstrated response.")
    chosen: str = Field("chosen", min_length=1, description="Column with the preferred response of a pair.")
    rejected: str = Field("rejected", min_length=1, description="Column with the other response of a pair.")
    reference: str = Field(
        "reference", min_length=1, description="Column of the prompt files with a reference response, if there is one."
    )


class Data(Section):
    """Where the data is and how it is split. Relative paths start at the folder of the YAML file."""

    demonstrations: Files = Field(
        (), description="Files of prompts with demonstrated responses, for SFT.", json_schema_extra=BY_CONTENT
    )
    prompts: Files = Field(
        (),
        description="Files of prompts for PPO and evaluation; without any, those of the demonstrations.",
        json_schema_extra=BY_CONTENT,
    )
    preferences: Files = Field(
        (), description="Files of pairs: prompt, chosen and rejected response.", json_schema_extra=BY_CONTENT
    )
    columns: Columns = Columns()
    prompt_template: str = Field(
        "{prompt}", description="How a prompt is built from the columns of its row, in Python format syntax."
    )
    validation_fraction: Fraction = Field(0.05, description="Share of the prompts kept for validation.")
    test_fraction: Fraction = Field(0.1, description="Share of the prompts kept for the final evaluation.")
    duplicates: Literal["error", "drop"] = Field(
        "error", description="What to do with a row that repeats an earlier one: refuse it, or drop and count it."
    )
    max_prompt_tokens: Count | None = Field(None, description="Longest prompt allowed, in tokens.")
    max_response_tokens: Count | None = Field(None, description="Longest response allowed, in tokens.")
    too_long: Literal["error", "drop"] = Field(
        "error",
        description="What to do with a row over those limits or the model's context: refuse, or drop and count.",
    )
    max_demonstrations: Count | None = Field(None, description="Use only this many demonstrations (rows).")
    max_prompts: Count | None = Field(None, description="Use only this many prompts (rows).")
    max_preferences: Count | None = Field(None, description="Use only this many preference pairs (rows).")

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.validation_fraction + self.test_fraction >= 1.0:
            raise ValueError(
                f"validation_fraction {self.validation_fraction} and test_fraction {self.test_fraction} leave nothing "
                "to train on; their sum must be below 1"
            )
        return self


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


class Supervised(OptionalStage):
    """What the two supervised trainings share."""

    epochs: Positive = Field(1.0, description="Passes over the training rows.")
    max_steps: Count | None = Field(None, description="Stop after this many optimizer steps, whatever epochs says.")
    batch_size: Count = Field(32, description="Examples per optimizer step.")
    micro_batch_size: Count | None = Field(
        None, description="Examples per forward pass; less needs less memory. Default: batch_size."
    )
    learning_rate: Positive = Field(1e-4, description="Peak learning rate of AdamW.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="Decay of the learning rate.")
    warmup_fraction: Fraction = Field(0.05, description="Share of the steps over which the learning rate rises.")
    weight_decay: NotNegative = Field(0.0, description="AdamW weight decay.")
    beta2: Annotated[float, Field(gt=0, lt=1)] = Field(0.999, description="AdamW second-moment decay.")
    max_grad_norm: Positive = Field(1.0, description="Gradients are clipped to this global norm.")
    log_every: Count = Field(10, description="Optimizer steps between two points of a curve.")
    checkpoint_every: Count = Field(
        200, description="Optimizer steps between two checkpoints.", json_schema_extra=NUMBERS_SAME
    )

    @model_validator(mode="after")
    def _check_batches(self) -> Supervised:
        micro = self.micro_batch_size
        if micro is not None and (micro > self.batch_size or self.batch_size % micro):
            raise ValueError(f"micro_batch_size {micro} must divide batch_size {self.batch_size}")
        return self


class Sft(Supervised):
    """Supervised fine-tuning on the demonstrations; the loss counts response tokens only."""


class Judge(OptionalStage):
    """Labels preference pairs. Pairs that come with the data are passed on; annotators' agreement is measured."""

    annotators: tuple[str, ...] = Field(
        (), description="Columns that hold each annotator's verdict (`chosen` or `rejected`), for the agreement."
    )


class Reward(Supervised):
    """Reward-model training on preference pairs with the Bradley-Terry loss."""

    path: str | None = Field(
        None,
        description="Start from this model instead of the SFT policy: local directory or hub id.",
        json_schema_extra=BY_CONTENT,
    )
    center: NotNegative = Field(
        0.0, description="Weight of the auxiliary loss that keeps the scores of a pair centred around zero."
    )
    normalize_std: bool = Field(
        False, description="Also divide scores by the standard deviation over the SFT references (mean 0 always)."
    )


class _PpoSection(OptionalStage):
    """Proximal policy optimisation of the policy against the reward, held near the SFT policy by a KL penalty."""

    rewards: dict[str, Finite] = Field(
        {"model": 1.0},
        description="Weight of each reward: `model` (the trained one), `module:function` or `file.py:function`.",
    )

    @model_validator(mode="after")
    def _check(self) -> _PpoSection:
        if problem := ppo_settings.conflict(self):  # type: ignore[arg-type]
            raise ValueError(problem)
        if self.enabled and not self.rewards:
            raise ValueError("rewards is empty; name at least one, e.g. {model: 1.0}")
        for name in self.rewards:
            if name != "model" and ":" not in name:
                raise ValueError(f"rewards: {name!r} is neither `model` nor of the form `module:function`")
        return self


def _options(settings: type) -> dict[str, Any]:
    """The fields of a dataclass of options as fields of a section."""
    types, found = get_type_hints(settings), {}
    for option in fields(settings):
        limits = dict(option.metadata)
        extra = NUMBERS_SAME if limits.pop("numbers_same") else None
        if "float" in str(types[option.name]):
            limits["allow_inf_nan"] = False
        found[option.name] = (types[option.name], Field(option.default, json_schema_extra=extra, **limits))
    return found


if TYPE_CHECKING:

    class Ppo(_PpoSection, ppo_settings.Settings):
        """The section with the options of the PPO engine."""
else:
    Ppo = create_model(
        "Ppo", __base__=_PpoSection, __doc__=_PpoSection.__doc__, __module__=__name__, **_options(ppo_settings.Settings)
    )


class Evaluate(OptionalStage):
    """Base, SFT and PPO policies on held-out prompts."""

    prompts: Count = Field(256, description="Held-out prompts to evaluate on (the first ones by hash).")
    temperature: NotNegative = Field(0.0, description="Sampling temperature; 0 is greedy.")
    max_new_tokens: Count = Field(53, description="Longest response, in tokens.")
    scorers: dict[str, str] = Field(
        {}, description="Further scores by name: `module:function` with the signature of a reward; never trained on."
    )
    bootstrap: Count = Field(1000, description="Bootstrap resamples of each confidence interval.")
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(0.95, description="Level of the intervals.")
    batch_size: Count = Field(64, description="Prompts generated at once.", json_schema_extra=NUMBERS_SAME)


class Resources(Section):
    """Where it computes; none of it is in a cache key."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` takes CUDA where there is one.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Autocast type of the forward passes: auto is bf16 on CUDA and fp32 on a CPU. fp16 needs CUDA.",
    )
    threads: Annotated[int, Field(ge=0)] = Field(0, description="CPU threads of torch; 0 takes all cores.")


class Tracking(Section):
    """Where metrics go; none of it is in a cache key."""

    enabled: bool = Field(
        True, description="Whether runs go to MLflow; when false, their journals stay on this machine, unsent."
    )
    uri: str | None = Field(
        None, description="MLflow tracking URI; default: a SQLite file in the home folder. Never put credentials here."
    )
    experiment: str = Field("rlhf", min_length=1, description="MLflow experiment.")


class PipelineConfig(Section):
    """The whole pipeline: dataset preparation, SFT, judging, reward model, PPO, evaluation."""

    name: str = Field(
        "pipeline", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Name of the pipeline, used in run names."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Seed of everything random.")
    data: Data
    model: Model
    sft: Sft = Sft()
    judge: Judge = Judge()
    reward: Reward = Reward()
    ppo: Ppo = Ppo()
    evaluate: Evaluate = Evaluate()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _check(self) -> PipelineConfig:
        if self.sft.enabled and not self.data.demonstrations:
            raise ValueError("sft needs data.demonstrations, which names no file; or leave it out with `sft: off`")
        if not (self.data.demonstrations or self.data.prompts or self.data.preferences):
            raise ValueError("data names no file; set data.demonstrations, data.prompts or data.preferences")
        if self.ppo.enabled and "model" in self.ppo.rewards and not self.reward.enabled:
            raise ValueError(
                "ppo.rewards names `model`, but the reward stage is off; turn it on or name a Python function"
            )
        if self.reward.enabled and not self.data.preferences:
            raise ValueError("reward needs data.preferences, which names no file; or leave it out with `reward: off`")
        if self.judge.enabled and not self.data.preferences:
            raise ValueError("judge needs data.preferences, which names no file; or leave it out with `judge: off`")
        if (self.ppo.enabled or self.evaluate.enabled) and not (self.data.demonstrations or self.data.prompts):
            raise ValueError("ppo and evaluate need prompts: set data.prompts or data.demonstrations")
        if problem := self._dtype_conflict():
            raise ValueError(problem)
        if self.model.init == "random":
            if self.model.architecture == "t5" and self.reward.enabled and self.reward.path is None:
                raise ValueError(
                    "the reward model starts from the policy, but model.architecture `t5` has no score for single "
                    "tokens; set reward.path to another model, or leave it out with `reward: off`"
                )
            for stage in ("ppo", "evaluate"):
                new = getattr(self, stage).max_new_tokens
                if new >= self.model.context:
                    raise ValueError(
                        f"{stage}.max_new_tokens {new} leaves no room for a prompt in model.context "
                        f"{self.model.context}"
                    )
        return self

    def _dtype_conflict(self) -> str | None:
        dtype = self.model.dtype
        trains = [stage for stage in ("sft", "reward", "ppo") if getattr(self, stage).enabled]
        if dtype == "float32" or not trains:
            return None
        if not self.model.lora_rank:
            return (
                f"model.dtype `{dtype}` is for frozen weights, but {trains[0]} trains all of them, and small steps "
                "would be rounded away; set model.lora_rank, or leave model.dtype at `float32` and set "
                "resources.precision, which computes in half precision"
            )
        if dtype == "float16" and self.resources.precision != "fp16":
            return (
                f"model.dtype is `float16`, and resources.precision `{self.resources.precision}` has no loss scaling, "
                "without which small gradients vanish; set resources.precision: fp16, or model.dtype: bfloat16"
            )
        return None
