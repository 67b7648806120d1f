"""The schema of the whole pipeline.

One set of pydantic models is the YAML file, the ``--set ppo.kl_coef=0.1`` of the command line and the form of the
Prefect UI. All models are frozen and refuse unknown keys. Every field says its unit. A field marked ``NUMBERS_SAME``
changes how a stage computes, not what: it is not part of the stage's cache key.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import Field, create_model, model_validator

from rlhf.config import ppo_options as ppo_settings
from rlhf.config.data import KINDS, Data
from rlhf.config.fields import NUMBERS_SAME, Count, NotNegative, OptionalStage, Positive, Rewards, RewardSpec, Scorers
from rlhf.config.fields import Section as Section
from rlhf.config.promotion import Promotion as Promotion
from rlhf.config.promotion import conflict as judge_conflict
from rlhf.config.resources import Resources as Resources
from rlhf.config.resources import conflict as processes_conflict
from rlhf.config.training import Reward as Reward
from rlhf.config.training import RewardTraining as RewardTraining
from rlhf.config.training import Sft as Sft
from rlhf.metrics.labels import COMPONENT, LABELS

Dtype = Literal["float32", "bfloat16", "float16"]


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


class Judge(OptionalStage):
    """Makes preferences: passes people's on, or judges pairs or samples of the SFT policy, and measures agreement."""

    by: Literal["people", "rewards", "comparison", "model"] = Field(
        "people",
        description="`people`: pairs are passed on as they are labelled; `rewards`: the higher score of judge.rewards "
        "is better; `comparison`: judge.function compares two responses; `model`: a judge model learns people's labels "
        "first, and its scores judge.",
    )
    rewards: Rewards = Field({}, description="Of `rewards`: the weight of each function, as in ppo.rewards.")
    function: str | None = Field(
        None,
        description="Of `comparison`: `module:function` of (prompts, firsts, seconds, **columns), which gives one "
        "number a row, above 0 where the first response is better. It is asked in both orders.",
    )
    model: RewardTraining = Field(
        RewardTraining(), description="Of `model`: the training of the judge model, as in section reward."
    )
    samples: Annotated[int, Field(ge=0)] = Field(
        0, description="Responses sampled from the SFT policy to each prompt; 0 judges the pairs of the data."
    )
    with_reference: bool = Field(False, description="Whether a prompt's reference is judged beside its samples.")
    prompts: Count | None = Field(None, description="Sample for at most this many prompts of each split.")
    temperature: Positive = Field(1.0, description="Sampling temperature.")
    max_new_tokens: Count = Field(53, description="Longest sampled response, in tokens.")
    batch_size: Count = Field(64, description="Prompts sampled at once.", json_schema_extra=NUMBERS_SAME)
    gives: Literal["pairs", "rankings", "ratings"] = Field(
        "pairs",
        description="What is made of the judged responses to a prompt: the best and the worst of them as a pair, all "
        "pairs of them, or each with its score.",
    )
    min_margin: NotNegative = Field(
        0.0, description="Responses whose scores differ by no more than this make no pair: it is a tie."
    )
    annotators: tuple[str, ...] = Field(
        (), description="Columns that hold each annotator's verdict (`chosen` or `rejected`), for the agreement."
    )
    source: str | None = Field(None, description="Column of the pairs by which the agreement with people is reported.")

    @model_validator(mode="after")
    def _check(self) -> Judge:
        if self.by == "people" and (self.samples or self.gives != "pairs"):
            raise ValueError(
                "by is `people`, who judged the pairs of the data already; set by to rewards, comparison or model, or "
                "leave samples and gives out"
            )
        if (self.by == "rewards") != bool(self.rewards):
            raise ValueError(f"rewards must be given for by: rewards, and for nothing else; by is `{self.by}`")
        if (self.by == "comparison") != bool(self.function):
            raise ValueError(f"function must be given for by: comparison, and for nothing else; by is `{self.by}`")
        if self.by == "comparison" and self.gives == "ratings":
            raise ValueError("gives is `ratings`, but a comparison gives no scores; set gives to pairs or rankings")
        if self.with_reference and not self.samples:
            raise ValueError("with_reference is for samples; set samples, or leave it out")
        if self.samples == 1 and not self.with_reference:
            raise ValueError("samples is 1, which makes no pair; set at least 2, or with_reference: true")
        if any(reward.function == "model" for reward in self.rewards.values()):
            raise ValueError("rewards: `model` is the reward model, which is trained later; set by: model for a judge")
        return self

    def makes(self, kind: str) -> bool:
        """Whether it writes `preferences` or `ratings`."""
        return self.enabled and self.by != "people" and (self.gives == "ratings") == (kind == "ratings")


class _PpoSection(OptionalStage):
    """Proximal policy optimisation of the policy against the reward, held near the SFT policy by a KL penalty."""

    rewards: Rewards = Field(
        {"model": RewardSpec(function="model")},
        description="Each reward's weight, or {weight, function, arguments}. Its name is its function: `model` (the "
        "trained one), a built-in, `module:function` or `file.py:function`.",
    )

    judges: Scorers = Field(
        {},
        description="Scores by name that each evaluation during training measures and nothing is trained on: a "
        "function as in ppo.rewards, or {function, arguments}. The held-out reward model is one by itself, `held_out`.",
    )

    @model_validator(mode="after")
    def _check(self) -> _PpoSection:
        options: Any = self  # which has those of the engine, too
        if problem := ppo_settings.conflict(options):
            raise ValueError(problem)
        if self.enabled and not self.rewards:
            raise ValueError("rewards is empty; name at least one, e.g. {model: 1.0}")
        from rlhf.rewards.registry import labels  # not at the top: most stages have no rewards among their code

        if "held_out" in self.judges:
            raise ValueError("judges: `held_out` is the held-out reward model's name; choose another one")
        allowed = ["score", *(f"reward/{label}" for label in labels(self.rewards).values())]
        allowed += [f"judge/{name}" for name in ("held_out", *self.judges)]
        if options.eval_every and options.best_metric is not None and options.best_metric not in allowed:
            raise ValueError(f"best_metric is {options.best_metric!r}; allowed are {', '.join(allowed)}")
        return self

    @property
    def uses_model(self) -> bool:
        """Whether the trained reward model is one of the rewards."""
        return any(reward.function == "model" for reward in self.rewards.values())


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
    scorers: Scorers = Field(
        {},
        description="Further scores by name, never trained on: a function as in ppo.rewards, or {function, arguments}.",
    )
    judges: dict[str, str] = Field(
        {},
        description="Functions by name that compare two responses, as judge.function does; each is asked in both "
        "orders, and gives win rates.",
    )
    length_column: str | None = Field(
        None, description="Column of the prompts with the number of words that a response should have."
    )
    bootstrap: Count = Field(1000, description="Bootstrap resamples of each confidence interval.")
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(0.95, description="Level of the intervals.")
    batch_size: Count = Field(64, description="Prompts generated at once.", json_schema_extra=NUMBERS_SAME)

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        for name in sorted(self.scorers.keys() & LABELS.keys()):
            raise ValueError(
                f"scorers: {name!r} is a metric that every evaluation has ({LABELS[name].name}); choose another name, "
                f"such as `my_{name}: {{function: ...}}`"
            )
        for name in filter(lambda name: name.startswith(COMPONENT), self.scorers):
            raise ValueError(
                f"scorers: {name!r} begins with `{COMPONENT}`, as the rewards of PPO do among the metrics; choose "
                "another name"
            )
        for name, function in self.judges.items():
            if name in self.scorers or name in LABELS:
                raise ValueError(f"judges: {name!r} is the name of a score, too; choose another one")
            if ":" not in function:
                raise ValueError(
                    f"judges.{name} is {function!r}; must be a function of yours, `module:function` or "
                    "`file.py:function`"
                )
        return self


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
    promotion: Promotion = Promotion()

    @model_validator(mode="after")
    def _check(self) -> PipelineConfig:
        data, needs = self.data, "which names no file and no row"
        pairs = data.has("preferences") or data.has("labelled")
        if not any(map(data.has, KINDS)):
            raise ValueError("data names no file; set data.demonstrations, data.prompts or data.preferences")
        if self.sft.enabled and not data.has("demonstrations"):
            raise ValueError(f"sft needs data.demonstrations, {needs}; or leave it out with `sft: off`")
        if self.ppo.enabled and self.ppo.uses_model and not self.reward.enabled:
            raise ValueError(
                "ppo.rewards names `model`, but the reward stage is off; turn it on or name a Python function"
            )
        by_held_out = self.ppo.enabled and self.ppo.eval_every and self.ppo.best_metric == "judge/held_out"
        if by_held_out and not (self.reward.enabled and self.reward.held_out):
            raise ValueError(
                "ppo.best_metric is `judge/held_out`, but no held-out reward model is trained; set reward.held_out, or "
                "choose by `score` or by one of ppo.judges"
            )
        self._check_preferences(pairs, needs)
        if (self.ppo.enabled or self.evaluate.enabled) and not (data.has("demonstrations") or data.has("prompts")):
            raise ValueError("ppo and evaluate need prompts: set data.prompts or data.demonstrations")
        if problem := self._dtype_conflict() or processes_conflict(self) or judge_conflict(self):
            raise ValueError(problem)
        if self.model.init == "random":
            for stage in ("ppo", "evaluate"):
                new = getattr(self, stage).max_new_tokens
                if new >= self.model.context:
                    raise ValueError(
                        f"{stage}.max_new_tokens {new} leaves no room for a prompt in model.context "
                        f"{self.model.context}"
                    )
        return self

    def _check_preferences(self, pairs: bool, needs: str) -> None:
        """See that the judge and the reward model have something to learn from."""
        data, judge, learns = self.data, self.judge, self.reward.enabled
        regression = self.reward.objective == "regression"
        if learns and not regression and not (pairs or judge.makes("preferences")):
            raise ValueError(
                f"reward needs data.preferences, {needs}; or leave it out with `reward: off`, let the judge make "
                "pairs, or learn from ratings with reward.objective: regression"
            )
        if learns and regression and not (data.has("ratings") or judge.makes("ratings")):
            raise ValueError(f"reward.objective `regression` needs data.ratings, {needs}, or judge.gives: ratings")
        if not judge.enabled:
            return
        ratings = judge.by == "model" and judge.model.objective == "regression"
        if not judge.samples and not pairs:
            raise ValueError(
                f"judge needs data.preferences, {needs}; or set judge.samples, or leave it out with `judge: off`"
            )
        if judge.by == "model" and not (data.has("ratings") if ratings else pairs):
            raise ValueError(f"judge.by `model` learns from data.{'ratings' if ratings else 'preferences'}, {needs}")
        if judge.samples and not (data.has("demonstrations") or data.has("prompts")):
            raise ValueError("judge.samples needs prompts: set data.prompts or data.demonstrations")

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
