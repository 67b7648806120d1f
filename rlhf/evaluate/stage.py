"""The evaluate stage: the base, SFT and PPO policies and the given references on held-out prompts.

All policies answer the same prompts with the same random numbers, so that they differ by what they learned and not by
luck. Every figure has a bootstrap interval over prompts, and policies are compared prompt by prompt.

``answers``: what the policies say. ``judged``: scores and judges. ``figures``: intervals and comparisons of them.
``earlier``: what the stages before recorded. ``files``: what is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf.context import Context
from rlhf.evaluate import answers as answering, earlier, figures, judged, output
from rlhf.evaluate.answers import Answers, HeldOut
from rlhf.evaluate.figures import REFERENCE, Sure
from rlhf.metrics import TextScores
from rlhf.training import computing


def run(context: Context) -> dict[str, float]:
    """Evaluate; write report.json, samples.parquet and plots/*.png.

    Returns:
        ``evaluate/<policy>/<metric>`` for base, sft, ppo and reference (headline ones with ``_low`` and ``_high``, the
        KL with ``_stderr``). Of PPO against SFT (of the last against the second last policy, where a stage is off)
        ``evaluate/win_rate/<score or judge>``, ``evaluate/win_rate_length_controlled/<score>``,
        ``evaluate/difference/<score>`` and ``evaluate/p_value/<score>``; ``evaluate/win_rate_against_base/<...>`` and
        ``evaluate/win_rate_against_references/<...>`` of the last policy. ``evaluate/training/reward`` is the mean
        score of texts that the reward model was trained on; ``evaluate/parameters/<model>`` and
        ``evaluate/size_mb/<model>`` (10^6 bytes) are of each policy, and of the reward models, as they are evaluated.
        Figures that are undefined are left out.

    Raises:
        ConfigError: a function cannot be loaded, or the prompts lack ``evaluate.length_column``.
        DataError: there is no held-out prompt, or one leaves no room for a response, or has no number as its length.
        ModelError: a policy or a reward model cannot be loaded.
        RewardError: a function failed.
    """
    config = context.config
    computing.set_up_cpu(config.resources)
    computing.seed_everything(config.seed)  # only a function of the user might draw from the global generators
    device = computing.device_of(config.resources)
    by = judged.functions(config)
    with torch.no_grad(), computing.autocast(config.resources), computing.quiet():
        rows = answering.held_out(context)
        answers = answering.of_policies(context, rows, device)
        if given := answering.given(context, rows):
            answers[REFERENCE] = given
        sizes = judged.score(context, rows, answers, by)
        verdicts = {
            (one, other): {
                name: judged.verdicts(judge, rows, answers[one], answers[other]) for name, judge in by.judges.items()
            }
            for one, other in figures.pairs(list(answers))
        }
    counted = judged.measure(rows, answers)
    scores = [*sizes, *by.scorers]
    report = _report(context, rows, answers, counted, scores, verdicts)
    report["models"] |= sizes
    values = {name: answer.values for name, answer in answers.items()} | earlier.training_scores(context)
    report["distributions"] = output.distributions(values, [*scores, "length_tokens"])
    output.write(context.out, report, values, _samples(rows, answers))
    return figures.finals(report)


def _report(
    context: Context,
    rows: HeldOut,
    answers: Mapping[str, Answers],
    counted: Mapping[str, TextScores],
    scores: Sequence[str],
    verdicts: Mapping[tuple[str, str], Mapping[str, Any]],
) -> figures.Figures:
    """Everything in report.json but the sizes of reward models and the distributions."""
    settings = context.config.evaluate
    sure = Sure(settings.confidence, settings.bootstrap, context.config.seed)
    measured = {name: figures.measured(answer, counted.get(name)) for name, answer in answers.items()}
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
        "judged": list(scores),
        "trained_on": judged.trained_on(context.config, scores),
        "metrics": {name: figures.estimates(of, sure) for name, of in measured.items()},
        "models": {name: answer.size for name, answer in answers.items() if answer.size is not None},
        "comparisons": [figures.compared(pair, measured, scores, said, sure) for pair, said in verdicts.items()],
        "pairs": earlier.pairs(context, sure),
        "curves": earlier.curves(context),
        "overoptimisation": earlier.overoptimisation(context),
    }


def _samples(rows: HeldOut, answers: Mapping[str, Answers]) -> dict[str, list[Any]]:
    """Columns of samples.parquet: prompt, reference (a list where a prompt has several), a text for each policy, then
    ``<policy>_<metric>``, and ``<policy>_nll``, of which the perplexity is made."""
    several = any(len(known) > 1 for known in rows.references)
    references: list[Any] = [known or None for known in rows.references]
    columns: dict[str, list[Any]] = {
        "prompt": list(rows.prompts.texts),
        "reference": references if several else [known[0] if known else None for known in rows.references],
    }
    columns |= {name: list(answer.texts) for name, answer in answers.items() if name != REFERENCE}
    for name, answer in answers.items():
        columns |= {f"{name}_{metric}": values.tolist() for metric, values in answer.values.items()}
        if answer.nll is not None:
            columns[f"{name}_nll"] = answer.nll.tolist()
    return columns
