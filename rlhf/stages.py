"""The stages of the pipeline, in their order: one table that everything else reads.

A stage has one name everywhere: command line, config section, module, Prefect task, artifact folder, metric prefix
and MLflow run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from rlhf.config.pipeline import PipelineConfig


StageName = Literal["prepare", "sft", "judge", "reward", "ppo", "evaluate"]


class Stage(NamedTuple):
    """What a stage is made of.

    ``settings`` are the config sections and fields that shape its numbers; the seed shapes all of them.
    ``inputs`` maps an earlier stage to the parts of its artifact (top-level files and folders) that this stage may
    read: only their digests are in the cache key, so that a change elsewhere leaves this stage cached.
    """

    name: str
    module: str  # has run(context) -> dict[str, float]
    settings: tuple[str, ...]
    inputs: dict[str, tuple[str, ...]]
    libraries: tuple[str, ...]  # distributions whose versions shape its numbers
    reads_base: bool = False  # whether it opens the base model even when there is an SFT policy
    distributed: bool = False  # whether it can run in several processes, of which only the first one writes


_WEIGHTS = ("model.lora_rank", "model.lora_alpha", "model.dtype")
_RANDOM_MODEL = tuple(
    f"model.{name}" for name in ("init", "architecture", "layers", "width", "heads", "context", "vocab_size")
)
_TORCH = ("torch", "transformers", "tokenizers", "accelerate", "peft", "numpy")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="prepare",
            module="rlhf.prepare.stage",
            settings=("data", *_RANDOM_MODEL),
            inputs={},
            libraries=("torch", "transformers", "tokenizers", "pyarrow", "datasets"),
            reads_base=True,
        ),
        Stage(
            name="sft",
            module="rlhf.sft.stage",
            settings=("sft", *_WEIGHTS),
            inputs={"prepare": ("demonstrations", "base")},
            libraries=(*_TORCH, "trl", "datasets"),
            reads_base=True,
            distributed=True,
        ),
        Stage(
            name="judge",
            module="rlhf.judge.stage",
            settings=("judge", *_WEIGHTS),
            inputs={
                "prepare": ("preferences", "ratings", "prompts", "base"),
                "sft": ("model",),
            },
            libraries=(*_TORCH, "trl", "datasets", "pyarrow"),
        ),
        Stage(
            name="reward",
            module="rlhf.reward.stage",
            settings=("reward", *_WEIGHTS),
            inputs={
                "prepare": ("demonstrations", "preferences", "ratings", "base"),
                "sft": ("model",),
                "judge": ("preferences", "ratings"),
            },
            libraries=(*_TORCH, "trl", "datasets"),
            distributed=True,
        ),
        Stage(
            name="ppo",
            module="rlhf.ppo.stage",
            settings=("ppo", *_WEIGHTS),
            inputs={"prepare": ("prompts", "base"), "sft": ("model",), "reward": ("model", "held_out")},
            libraries=_TORCH,
            distributed=True,
        ),
        Stage(
            name="evaluate",
            module="rlhf.evaluate.stage",
            settings=("evaluate", "ppo.rewards", "model.dtype"),
            inputs={
                "prepare": ("prompts", "base"),
                "sft": ("model",),
                "reward": ("model", "held_out", "scores.parquet"),
                "ppo": ("model", "curves.parquet", "evaluations.parquet"),
            },
            libraries=(*_TORCH, "rouge-score", "sacrebleu", "nltk", "evaluate", "matplotlib"),
            reads_base=True,
        ),
    )
}


# Parts of the judge that it loads by name, where the configuration asks for them: their code (and all that it imports)
# is in its key only then, so that a change of the PPO engine does not concern a judge that samples nothing.
JUDGE_SAMPLING, JUDGE_MODEL = "rlhf.judge.sampling", "rlhf.judge.learned"


def stage_modules(name: str, config: PipelineConfig) -> tuple[str, ...]:
    """The modules that a stage runs, and whose code is in its key with all that they import."""
    modules = [STAGES[name].module]
    if name == "judge":
        modules += [JUDGE_SAMPLING] if config.judge.samples else []
        modules += [JUDGE_MODEL] if config.judge.by == "model" else []
    return tuple(modules)


def enabled_stages(config: PipelineConfig) -> tuple[str, ...]:
    """Names of the stages that are on, in their order. ``prepare`` always is."""
    return tuple(name for name in STAGES if name == "prepare" or getattr(config, name).enabled)


def stage_inputs(name: str, config: PipelineConfig) -> dict[str, tuple[str, ...]]:
    """The inputs that a stage has under this configuration: none from stages that are off.

    The base model counts only where it is read: made by ``prepare`` (``model.init: random``), and by a stage
    that needs it beside, or in place of, the SFT policy.
    """
    on = enabled_stages(config)
    found = {source: parts for source, parts in STAGES[name].inputs.items() if source in on}
    if "judge" in found and "prepare" in found:  # the judge passes on what it does not make
        found["prepare"] = tuple(part for part in found["prepare"] if part not in ("preferences", "ratings"))
    if name == "judge":
        return _judge_inputs(found, config)
    if "prepare" in found and not (config.model.init == "random" and reads_base(name, config)):
        found["prepare"] = tuple(part for part in found["prepare"] if part != "base")
    return found


def _judge_inputs(found: dict[str, tuple[str, ...]], config: PipelineConfig) -> dict[str, tuple[str, ...]]:
    """What the judge reads: prompts and a policy only where it samples, a model only where it learns or samples."""
    unread = set() if config.judge.samples else {"prompts"}
    if not (config.model.init == "random" and reads_base("judge", config)):
        unread.add("base")
    return {
        source: tuple(part for part in parts if part not in unread)
        for source, parts in found.items()
        if source != "sft" or _judge_opens_policy(config)
    }


def _judge_opens_policy(config: PipelineConfig) -> bool:
    """Whether the judge samples the SFT policy, or makes a judge model of it."""
    return bool(config.judge.samples) or (config.judge.by == "model" and config.judge.model.path is None)


def reads_base(name: str, config: PipelineConfig) -> bool:
    """Whether a stage opens the model as it was before any training."""
    if name == "judge" and not _judge_opens_policy(config):
        return False
    return STAGES[name].reads_base or ("sft" in STAGES[name].inputs and "sft" not in enabled_stages(config))
