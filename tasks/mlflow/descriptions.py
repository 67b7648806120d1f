"""What MLflow says of runs, registered models and their versions, in sentences for people (Markdown)."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf.config import PipelineConfig, written
from rlhf.runs import sentences, value

LAST_FIRST = ("ppo", "sft", "base")
# Of the last policy, beside win rates and scores; those of the reward model.
POLICY_FIGURES = {"kl": "KL to the reference policy, nats per response", "rougeL": "ROUGE-L", "length_tokens": "tokens"}
REWARD_FIGURES = {
    "reward/test_accuracy": "held-out pairs ordered rightly",
    "reward/held_out/test_accuracy": "the same by the held-out model",
}


def of_run(config: PipelineConfig, metrics: Mapping[str, float] | None = None, link: str = "") -> str:
    """What a run was asked, and what it came to once its final metrics are there; ``link`` leads elsewhere."""
    came_to = [_outcome(config, metrics)] if metrics else []
    return "\n\n".join(filter(None, [*came_to, f"Asked: {_asked(config)}.", link]))


def of_registered(config: PipelineConfig, stage: str) -> str:
    """What a registered model is, whatever its versions."""
    what = "Reward model" if stage == "reward" else "Policy"
    return (
        f"{what} of the pipeline `{config.name}`, a version for each finished run with a model of its own. "
        "`@candidate` is that of the last finished run, `@champion` the one in use: the gate moves it, or a person by "
        f"`rlhf champion`, and `rlhf champion rollback {config.name}` goes back."
    )


def of_version(config: PipelineConfig, run_id: str, registered: str, stage: str, metrics: Mapping[str, float]) -> str:
    """What one version is, how it was made, what it reached, and how it is used; ``metrics`` are the run's finals."""
    what = "Reward model" if stage == "reward" else f"Policy after {stage}"
    lines = [f"{what} of run `{run_id}` of the pipeline `{config.name}`: {_made(config, stage)}."]
    lines += [f"- {name}: {figure}" for name, figure in _named(stage, metrics).items()]
    lines += [f"- {line}" for line in sentences(metrics) if stage != "reward" and " against " in line]
    if stage == "reward":
        columns = '{"prompt": ["..."], "response": ["..."]}'
        use = [f'mlflow.pyfunc.load_model("models:/{registered}@champion").predict(pandas.DataFrame({columns}))']
    else:
        use = [
            f'rlhf generate models:/{registered}@champion --prompt "..."',
            f"mlflow models serve -m models:/{registered}@champion --env-manager local",
        ]
    return "\n".join([*lines, "", *(f"    {line}" for line in use)])


def figures(stage: str, metrics: Mapping[str, float]) -> dict[str, str]:
    """The headline figures of a version as tags, with their intervals."""
    return {name: value(metrics, name) for name in _headlines(stage, metrics)}


def _headlines(stage: str, metrics: Mapping[str, float]) -> list[str]:
    if stage == "reward":
        return [name for name in REWARD_FIGURES if name in metrics]
    wins = [name for name in metrics if name.startswith("evaluate/win_rate/") and not name.endswith(("_low", "_high"))]
    names = [f"evaluate/{stage}/{name}" for name in ("reward", "held_out", *POLICY_FIGURES)]
    return [name for name in (*sorted(wins), *names, "ppo/overoptimised") if name in metrics]


def _named(stage: str, metrics: Mapping[str, float]) -> dict[str, str]:
    names = REWARD_FIGURES if stage == "reward" else {f"evaluate/{stage}/{k}": v for k, v in POLICY_FIGURES.items()}
    return {text: value(metrics, name) for name, text in names.items() if name in metrics}


def _outcome(config: PipelineConfig, metrics: Mapping[str, float]) -> str:
    """Whether the last policy is better than the one before it, in one sentence, by what decides about champions."""
    judges = (config.promotion.judge, *config.evaluate.scorers, "reward")
    judge = next((name for name in judges if f"evaluate/win_rate/{name}" in metrics), None)
    policies = [name for name in LAST_FIRST if f"evaluate/{name}/length_tokens" in metrics]
    if judge is None or len(policies) < 2:
        return ""
    low, high = (metrics.get(f"evaluate/win_rate/{judge}_{end}", 0.5) for end in ("low", "high"))
    verb = "is better than" if low > 0.5 else "is worse than" if high < 0.5 else "is not surely different from"
    kl = metrics.get(f"evaluate/{policies[0]}/kl")
    distance = f", at a KL of {kl:.3g} nats per response" if kl is not None else ""
    rate = value(metrics, f"evaluate/win_rate/{judge}")
    return f"{policies[0].upper()} {verb} {policies[1].upper()}: win rate {rate} by {judge}{distance}."


def _asked(config: PipelineConfig) -> str:
    stages = [stage for stage in ("sft", "judge", "reward", "ppo") if getattr(config, stage).enabled]
    made = [text for stage in stages if (text := _made(config, stage))]
    return "; ".join([f"seed {config.seed}", *made])


def _made(config: PipelineConfig, stage: str) -> str:
    """How a stage makes its model, in a few words."""
    start = config.model.path or f"a {config.model.architecture} from random weights"
    match stage:
        case "sft":
            return f"{config.sft.epochs:g} epochs of SFT of {start}"
        case "reward":
            about = config.reward
            of = about.path or ("the SFT policy" if config.sft.enabled else start)
            return f"{about.epochs:g} epochs of {about.objective} reward training of {of}"
        case "ppo":
            ppo = config.ppo
            rewards = ", ".join(f"{name} x {weight}" for name, weight in written(ppo.rewards).items())
            return (
                f"{ppo.updates} updates of {ppo.episodes} episodes of PPO with the reward {rewards}, KL coefficient "
                f"{ppo.kl_coef:g}"
            )
        case _:
            return f"{stage} by {config.judge.by}" if stage == "judge" else ""
