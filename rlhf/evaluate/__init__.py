"""The evaluate stage: the base, SFT and PPO policies and the given references on held-out prompts.

All policies answer the same prompts with the same random numbers, so that they differ by what they learned and not by
luck. Every figure has a bootstrap interval over prompts, and PPO is compared with SFT prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf import intervals, metrics, models, rewards, training
from rlhf.config import PipelineConfig
from rlhf.context import Context
from rlhf.errors import DataError
from rlhf.evaluate import files
from rlhf.intervals import Estimate
from rlhf.ppo import batching
from rlhf.ppo.batching import Prompts
from rlhf.ppo.checks import check_policy
from rlhf.ppo.generation import GREEDY
from rlhf.ppo.policy import Policy, exact_kl
from rlhf.ppo.rollout import collect, per_token

Floats = NDArray[np.float64]

TOKENS_AT_ONCE = 16384  # of a forward pass for the KL, padding included
HEADLINES = ("reward", "rougeL", "kl", "length_tokens")  # besides the scorers: metrics whose bounds are finals too


class HeldOut(NamedTuple):
    """The rows to evaluate on; ``references`` has None where there is none, and so has its column in ``prompts``."""

    prompts: Prompts
    references: list[str | None]


class Answers(NamedTuple):
    """One text for each prompt (None: there is none), values (n,) by metric, and the size of what wrote them."""

    texts: Sequence[str | None]
    values: dict[str, Floats]
    size: dict[str, float] | None = None


def run(context: Context) -> dict[str, float]:
    """Evaluate; write report.json, samples.parquet and plots/*.png.

    Returns:
        ``evaluate/<policy>/<metric>`` for base, sft, ppo and reference, ``evaluate/win_rate/<score>`` and
        ``evaluate/difference/<score>`` of PPO against SFT (of the last against the second last policy, where a stage
        is off); ``evaluate/win_rate_against_references/<score>`` of the last policy; the headline ones with ``_low``
        and ``_high``. ``evaluate/training/reward`` is the mean score of texts that the reward model was trained on;
        ``evaluate/parameters/<model>`` and ``evaluate/size_mb/<model>`` (10^6 bytes) are of each policy, and of
        ``reward``, as they are evaluated. Figures that are undefined are left out.

    Raises:
        ConfigError: a scorer cannot be loaded.
        DataError: there is no held-out prompt, or one leaves no room for a response.
        ModelError: a policy or the reward model cannot be loaded.
        RewardError: a scorer failed.
    """
    config = context.config
    training.set_up_cpu(config.resources)
    training.seed_everything(config.seed)  # only a scorer might draw from the global generators
    device = training.device_of(config.resources)
    with torch.no_grad(), training.autocast(config.resources), training.quiet():
        scorers = _scorers(context)
        rows = _held_out(context)
        answers = _policy_answers(context, rows, device)
        if any(rows.references):
            answers["reference"] = _given_answers(context, rows)
        for name, answer in answers.items():
            answer.values.update(_judged(scorers, rows, answer.texts))
            if name != "reference":
                answer.values.update(_against_references(answer.texts, rows.references))
    values = {name: answer.values for name, answer in answers.items()} | _training_scores(context)
    made = _report(context, rows, answers, values, list(scorers))
    if isinstance(judge := scorers.get("reward"), rewards.RewardModel):
        made["models"]["reward"] = _size(judge.model)
    files.write(context.out, made, values, _samples(rows, answers))
    return _finals(made)


# --- answers --------------------------------------------------------------------------------------------------------


def _held_out(context: Context) -> HeldOut:
    path = context.input("prepare/prompts/test.parquet")
    table = pq.read_table(path).slice(0, context.config.evaluate.prompts)
    if not table.num_rows:
        raise DataError(f"{path}: there is no held-out prompt; raise data.test_fraction or leave evaluate out")
    columns = table.to_pydict()
    texts = columns.pop("prompt")
    encoder = models.is_encoder_decoder(context.sft_model(), **context.model_options(context.sft_model()))
    token_ids = models.prompt_token_ids(_tokenizer(context), texts, encoder=encoder)
    references = columns.get("reference") or [None] * len(texts)
    given = [text if text and text.strip() else None for text in references]
    return HeldOut(Prompts(texts, token_ids, columns), given)


def _policy_answers(context: Context, rows: HeldOut, device: torch.device) -> dict[str, Answers]:
    """What each policy answers, with lengths and KL to the policy that PPO is held near."""
    paths = {"base": context.base_model(), "sft": context.sft_model(), "ppo": context.policy_model()}
    paths = {name: path for name, path in paths.items() if name == "base" or name in context.inputs}
    tokenizer = _tokenizer(context)
    reference = _policy(context, context.sft_model(), device)
    answers = {}
    for number, (name, path) in enumerate(paths.items()):
        policy = reference if path == context.sft_model() else _policy(context, path, device)
        answers[name] = _answers(context.config, policy, reference, tokenizer, rows.prompts)
        context.tracker.progress(number + 1, len(paths))
    return answers


def _policy(context: Context, path: str, device: torch.device) -> Policy:
    model = models.load_policy(path, **context.model_options(path), dtype=context.config.model.dtype)
    policy = Policy(model.to(device).eval())
    check_policy(policy)
    return policy


def _tokenizer(context: Context) -> PreTrainedTokenizerBase:
    """The tokenizer of all policies."""
    return models.load_tokenizer(context.sft_model(), **context.model_options(context.sft_model()))


def _answers(
    config: PipelineConfig,
    policy: Policy,
    reference: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
) -> Answers:
    settings = config.evaluate
    temperature = settings.temperature or GREEDY
    _check_room(policy, prompts, settings.max_new_tokens)
    # Row i's draws are the same for every policy and every batch size.
    uniforms = torch.rand(len(prompts), settings.max_new_tokens, generator=batching.generator(config.seed, "evaluate"))
    kl = partial(exact_kl, policy, reference, settings.temperature or 1.0)
    texts: list[str] = []
    values: dict[str, list[Tensor]] = {"length_tokens": [], "eos_rate": [], "kl": []}
    for start in range(0, len(prompts), settings.batch_size):
        rows = range(len(prompts))[start : start + settings.batch_size]
        made = collect(
            policy, tokenizer, prompts.select(rows), uniforms[rows], temperature, policy.language_model.device
        )
        texts += made.responses
        values["length_tokens"].append(made.sequences.response_lengths)
        values["eos_rate"].append(made.ended)
        values["kl"].append(per_token(kl, made.sequences, TOKENS_AT_ONCE).sum(1))
    known = {name: torch.cat(parts).double().cpu().numpy() for name, parts in values.items()}
    return Answers(texts, known, _size(policy.language_model))


def _size(model: torch.nn.Module) -> dict[str, float]:
    """How many parameters a model has, and what they take in the memory, in MB (10^6 bytes)."""
    return {
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        "size_mb": training.bytes_of(model.parameters()) / 1e6,
    }


def _check_room(policy: Policy, prompts: Prompts, new: int) -> None:
    """See that every prompt and its response fit into the model's context."""
    config = policy.language_model.config
    longest = max(map(len, prompts.token_ids))
    if not models.fits(config, longest, new):
        raise DataError(
            f"a held-out prompt of {longest} tokens and evaluate.max_new_tokens {new} do not fit into the model's "
            f"context of {config.max_position_embeddings} tokens; lower evaluate.max_new_tokens, or set "
            "data.max_prompt_tokens"
        )


def _given_answers(context: Context, rows: HeldOut) -> Answers:
    """The references as if a policy had written them: a yardstick for every score."""
    tokenizer = _tokenizer(context)
    lengths = [
        np.nan if text is None else len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
        for text in rows.references
    ]
    return Answers(rows.references, {"length_tokens": np.array(lengths, dtype=np.float64)})


# --- scores ---------------------------------------------------------------------------------------------------------


def _scorers(context: Context) -> dict[str, rewards.Scorer]:
    """The reward model, where that stage is on, then the scorers of the configuration."""
    found: dict[str, rewards.Scorer] = {}
    if "reward" in context.inputs:
        path = context.input("reward/model")
        trusted = context.config.model.trust_remote_code
        model = models.load_reward_model(path, trust_remote_code=trusted, dtype=context.config.model.dtype).eval()
        model.to(training.device_of(context.config.resources))
        found["reward"] = rewards.RewardModel(model, models.load_tokenizer(path, trust_remote_code=trusted))
    for name, spec in context.config.evaluate.scorers.items():
        found[name] = rewards.make_scorer(spec.function, spec.arguments)
    return found


def _judged(scorers: Mapping[str, rewards.Scorer], rows: HeldOut, texts: Sequence[str | None]) -> dict[str, Floats]:
    """Every score of the texts, (n,), and their words; NaN where there is no text."""
    known = [row for row, text in enumerate(texts) if text is not None]
    responses = [texts[row] or "" for row in known]
    asked = rows.prompts.select(known)
    found: dict[str, Any] = {name: scorer(asked.texts, responses, asked.columns) for name, scorer in scorers.items()}
    found["length_words"] = metrics.word_lengths(responses)
    values = {name: np.full(len(texts), np.nan) for name in found}
    for name, scores in found.items():
        values[name][known] = scores
    return values


def _against_references(texts: Sequence[str | None], references: Sequence[str | None]) -> dict[str, Floats]:
    """ROUGE, sentence BLEU and METEOR of each text, (n,); nothing without a single reference."""
    if not any(references):
        return {}
    predictions, targets = [text or "" for text in texts], [reference or "" for reference in references]
    found = metrics.text_metrics().compute(predictions=predictions, references=targets, per_example=True)
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


# --- figures --------------------------------------------------------------------------------------------------------


def _report(
    context: Context,
    rows: HeldOut,
    answers: Mapping[str, Answers],
    values: Mapping[str, Mapping[str, Floats]],
    judged: list[str],
) -> files.Report:
    """Everything in report.json."""
    settings = context.config.evaluate
    sure = {"confidence": settings.confidence, "resamples": settings.bootstrap, "seed": context.config.seed}
    policies = [name for name in answers if name != "reference"]
    return {
        "prompts": len(rows.prompts),
        "settings": {
            "temperature": settings.temperature,
            "kl_temperature": settings.temperature or 1.0,
            "max_new_tokens": settings.max_new_tokens,
            "seed": context.config.seed,
            "confidence": settings.confidence,
            "bootstrap": settings.bootstrap,
        },
        "kl_reference": "sft" if "sft" in answers else "base",
        "judged": judged,
        "metrics": {name: _estimates(answer, rows.references, sure) for name, answer in answers.items()},
        "models": {name: answer.size for name, answer in answers.items() if answer.size is not None},
        "comparison": _comparison(values, policies, judged, sure),
        "against_references": _against_the_given(values, policies[-1], judged, sure),
        "distributions": files.distributions(values, [*judged, "length_tokens"]),
        "pairs": _pairs(context, sure),
        "curves": _curves(context),
    }


def _estimates(answer: Answers, references: Sequence[str | None], sure: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: intervals.bootstrap_interval(values, **sure) for name, values in answer.values.items()}
    texts = [text for text in answer.texts if text is not None]
    for order in (1, 2):
        statistic = metrics.distinct(texts, order)
        found[f"distinct{order}"] = intervals.corpus_bootstrap(statistic, len(texts), limits=(0.0, 1.0), **sure)
    if "sentence_bleu" in answer.values:
        pairs = [(text or "", given) for text, given in zip(answer.texts, references, strict=True) if given]
        counts = metrics.bleu_statistics([text for text, _ in pairs], [given for _, given in pairs])
        found["bleu"] = intervals.corpus_bootstrap(
            metrics.bleu_statistic(counts), len(pairs), limits=(0.0, 100.0), **sure
        )
    return {name: estimate._asdict() for name, estimate in found.items()}


def _comparison(
    values: Mapping[str, Mapping[str, Floats]], policies: Sequence[str], judged: Sequence[str], sure: Mapping[str, Any]
) -> files.Report | None:
    """The last policy against the one before it, by every score: win rates and paired differences."""
    if len(policies) < 2:
        return None
    baseline, candidate = policies[-2:]

    def by_score(compare: Callable[..., Estimate]) -> dict[str, Any]:
        return {name: compare(values[candidate][name], values[baseline][name], **sure)._asdict() for name in judged}

    return {
        "candidate": candidate,
        "baseline": baseline,
        "win_rates": by_score(intervals.win_rate),
        "differences": by_score(intervals.paired_difference),
    }


def _against_the_given(
    values: Mapping[str, Mapping[str, Floats]], candidate: str, judged: Sequence[str], sure: Mapping[str, Any]
) -> files.Report | None:
    """How often the last policy's response scores above the given one; None where none is given, or nothing scores."""
    if "reference" not in values or not judged:
        return None
    pairs = {name: (values[candidate][name], values["reference"][name]) for name in judged}
    rates = {name: intervals.win_rate(*pair, **sure)._asdict() for name, pair in pairs.items()}
    return {"candidate": candidate, "win_rates": rates}


def _training_scores(context: Context) -> dict[str, dict[str, Floats]]:
    """Scores of both sides of pairs that the reward model was trained on, as the reward stage recorded them."""
    if not context.has("reward/scores.parquet"):
        return {}
    table = pq.read_table(context.input("reward/scores.parquet"), filters=[("split", "==", "train")])
    scores = np.concatenate([table[f"{side}_score"].to_numpy() for side in ("chosen", "rejected")])
    return {"training": {"reward": scores.astype(np.float64)}} if len(scores) else {}


def _pairs(context: Context, sure: Mapping[str, Any]) -> files.Report | None:
    """Scores of both sides of the held-out preference pairs, as the reward stage recorded them."""
    if not context.has("reward/scores.parquet"):
        return None
    table = pq.read_table(context.input("reward/scores.parquet"), filters=[("split", "==", "test")])
    chosen, rejected = (table[f"{side}_score"].to_numpy() for side in ("chosen", "rejected"))
    if not table.num_rows:
        return None
    sides = {"chosen": {"score": chosen}, "rejected": {"score": rejected}}
    return {
        "n": table.num_rows,
        "accuracy": intervals.win_rate(chosen, rejected, **sure)._asdict(),
        "scores": files.distributions(sides, ["score"])["score"],
    }


def _curves(context: Context) -> dict[str, list[float]] | None:
    """Reward and KL of each PPO update, as the ppo stage recorded them."""
    if not context.has("ppo/curves.parquet"):
        return None
    table = pq.read_table(context.input("ppo/curves.parquet"))
    curves: dict[str, list[float]] = table.select(["step", *files.CURVES]).to_pydict()
    return curves


def _samples(rows: HeldOut, answers: Mapping[str, Answers]) -> dict[str, list[Any]]:
    """Columns of samples.parquet: prompt, reference, a text for each policy, then ``<policy>_<metric>``."""
    columns: dict[str, list[Any]] = {"prompt": list(rows.prompts.texts), "reference": rows.references}
    columns |= {name: list(answer.texts) for name, answer in answers.items()}
    for name, answer in answers.items():
        columns |= {f"{name}_{metric}": values.tolist() for metric, values in answer.values.items()}
    return columns


def _finals(made: files.Report) -> dict[str, float]:
    found: dict[str, float] = {}

    def add(name: str, estimate: Mapping[str, float], bounds: bool) -> None:
        figures = {name: estimate["value"]}
        if bounds:
            figures |= {f"{name}_low": estimate["low"], f"{name}_high": estimate["high"]}
        found.update({key: float(value) for key, value in figures.items() if np.isfinite(value)})

    for policy, estimates in made["metrics"].items():
        for metric, estimate in estimates.items():
            add(f"evaluate/{policy}/{metric}", estimate, metric in HEADLINES or metric in made["judged"])
    for kind, part, estimates in (
        ("win_rate", "comparison", "win_rates"),
        ("difference", "comparison", "differences"),
        ("win_rate_against_references", "against_references", "win_rates"),
    ):
        for metric, estimate in (made[part] or {estimates: {}})[estimates].items():
            add(f"evaluate/{kind}/{metric}", estimate, True)
    for name, size in made["models"].items():
        found |= {f"evaluate/{kind}/{name}": value for kind, value in size.items()}
    means = made["distributions"].get("reward", {"means": {}})["means"]
    return found | ({"evaluate/training/reward": means["training"]} if "training" in means else {})
