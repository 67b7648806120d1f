"""Did it get better, by how much, how sure, at what KL, and was the reward over-optimised: what one reads first.

Scores that PPO was trained on decide nothing: any training raises them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rlhf.report.sources import Sources
from rlhf.report.words import in_sentence, interval, listed, number, p_value, percents, policy, score_name, value_of

Tone = Literal["good", "bad", "open"]
Comparison = Mapping[str, Any]


class Tile(NamedTuple):
    """One figure of the summary: what it is, the figure, its interval, and what is to be known beside it."""

    name: str
    figure: str
    interval: str
    beside: str


class Verdict(NamedTuple):
    """The answer in a sentence, further sentences, the figures below it."""

    tone: Tone
    sentence: str
    further: Sequence[str]
    tiles: Sequence[Tile]


def verdict(sources: Sources) -> Verdict:
    """The summary of a run, as far as it was evaluated."""
    report = sources.evaluation
    if not report:
        return Verdict("open", _unevaluated(sources), [], [])
    comparisons = report.get("comparisons")
    if comparisons is None:
        return Verdict("open", "This evaluation is of an older version, which compared otherwise.", _small(report), [])
    if not comparisons:
        return Verdict("open", "There is only one policy, so nothing to compare it with.", [], _tiles(sources, None))
    first = comparisons[0]
    tone, sentence = judgement(first, report.get("trained_on") or [])
    if tone == "good" and any(alarms(report).values()):
        tone = "open"
    return Verdict(tone, sentence, [*_alarm_words(report), *_small(report)], _tiles(sources, first))


def judgement(comparison: Comparison, trained_on: Sequence[str]) -> tuple[Tone, str]:
    """One sentence about a comparison, from the interval of each score's difference."""
    new, old = _who(comparison)
    signs = {name: sign(of.get("difference")) for name, of in comparison.get("scores", {}).items()}
    independent = {name: value for name, value in signs.items() if name not in trained_on}
    risen = any(signs.get(name) == 1 for name in trained_on)
    if not signs:
        return "open", f"{new} and {old} were not scored: there is neither a reward model nor a scorer."
    if not independent:
        became = {1: "more reward than", 0: "about as much reward as", -1: "less reward than"}
        much = became[max(signs.values(), key=abs)]
        return "open", f"{new} has {much} {old}, but nothing judged it that it was not trained on."
    found = set(independent.values())
    by = listed([in_sentence(score_name(name)) for name in independent])
    if found == {1}:
        return "good", f"{new} is better than {old}, by {by}."
    if found == {-1} or (risen and -1 in found):
        worse = listed([in_sentence(score_name(name)) for name, value in independent.items() if value == -1])
        more = f"has more reward than {old}, but is worse" if risen else f"is worse than {old}"
        return "bad", f"{new} {more} by {worse}{': the reward was over-optimised' if risen else ''}."
    if found == {0}:
        which = "each interval contains" if len(independent) > 1 else "its interval contains"
        return "open", f"No clear difference between {new} and {old} by {by}: {which} 0."
    parts = [
        f"{word} by {listed([in_sentence(score_name(name)) for name, value in independent.items() if value == wanted])}"
        for wanted, word in ((1, "better"), (-1, "worse"), (0, "not clearly different"))
        if wanted in found
    ]
    return "open", f"{new} against {old}: {', '.join(parts)}."


def sign(difference: Mapping[str, Any] | None) -> int:
    """1 or -1 where the interval of a difference is on one side of 0, else 0."""
    low, high = ((difference or {}).get(end) for end in ("low", "high"))
    return 1 if low is not None and low > 0 else -1 if high is not None and high < 0 else 0


def judge_of(sources: Sources, comparison: Comparison) -> str | None:
    """The score that the summary is about: the one that promotes, else the first that PPO was not trained on."""
    scores = comparison.get("scores", {})
    wanted = sources.config.promotion.judge if sources.config is not None else "held_out"
    trained_on = sources.evaluation.get("trained_on") or []
    order = [wanted, *(name for name in scores if name not in trained_on), *scores]
    return next((name for name in order if name in scores), None)


def alarms(report: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each judge's alarm was on at the last evaluation during PPO."""
    judges = (report.get("overoptimisation") or {}).get("judges") or {}
    return {name: bool(of["alarm"][-1]) for name, of in judges.items() if of.get("alarm")}


def _tiles(sources: Sources, comparison: Comparison | None) -> list[Tile]:
    report = sources.evaluation
    tiles: list[Tile] = []
    judge = judge_of(sources, comparison) if comparison is not None else None
    if comparison is not None and judge is not None:
        new, old = _who(comparison)
        of, by = comparison["scores"][judge], f"by {in_sentence(score_name(judge))}"
        fair = of.get("win_rate_length_controlled")
        beside = f"{by}; at equal length {percents(fair)}" if fair and fair.get("value") is not None else by
        tiles.append(Tile(f"{new} wins against {old}", *_split(percents(of.get("win_rate"))), beside))
        sure = f"p {_equals(p_value(value_of(of.get('p'))))}, effect size {number(value_of(of.get('effect')), 2)}"
        sure = sure if of.get("p") is not None else ""
        tiles.append(
            Tile(f"Change in {score_name(judge).lower()}", *_split(interval(of.get("difference"), 2, sign=True)), sure)
        )
    last = (comparison or {}).get("candidate") or next(iter(reversed([*_policies(report)])), "")
    if kl := report.get("metrics", {}).get(last, {}).get("kl"):
        spread = (
            f"\N{PLUS-MINUS SIGN} {number(kl['stderr'], 2)} standard error; " if kl.get("stderr") is not None else ""
        )
        reference = policy(str(report.get("kl_reference", "sft")))
        tiles.append(Tile(f"KL to {reference}", *_split(interval(kl, 2)), f"{spread}nats a response"))
    tiles.append(_overoptimised(alarms(report)))
    return tiles


def _split(written: str) -> tuple[str, str]:
    """An estimate and its interval."""
    value, bracket, rest = written.partition(" [")
    return value, f"{bracket}{rest}".strip()


def _overoptimised(alarm: Mapping[str, bool]) -> Tile:
    name = "Over-optimised"
    if not alarm:
        return Tile(name, "not measured", "", "PPO had no judge")
    on = [score_name(judge) for judge, ringing in alarm.items() if ringing]
    if on:
        return Tile(name, "yes", "", f"reward rose while it fell by {listed([in_sentence(of) for of in on])}")
    return Tile(name, "no", "", f"no alarm by {listed([in_sentence(score_name(judge)) for judge in alarm])}")


def _alarm_words(report: Mapping[str, Any]) -> list[str]:
    on = [in_sentence(score_name(judge)) for judge, ringing in alarms(report).items() if ringing]
    if not on:
        return []
    return [f"During PPO the reward rose while the score by {listed(on)} fell: see Reward against KL."]


def _small(report: Mapping[str, Any]) -> list[str]:
    """What the figures stand on."""
    settings = report.get("settings", {})
    temperature = settings.get("temperature")
    how = "greedy" if not temperature else f"sampled at temperature {temperature:g}"
    sure = f"{100 * settings['confidence']:g} %" if "confidence" in settings else "bootstrap"
    prompts = f"{report.get('prompts', 0):,} held-out prompts, {how}"
    return [f"{prompts}. Brackets are {sure} intervals, by bootstrap over prompts."]


def _unevaluated(sources: Sources) -> str:
    done = ", ".join(sources.manifests) or "no stage"
    if "evaluate" in sources.manifests and "evaluate" not in sources.directories:
        return "The evaluation’s artifact is gone, so that its figures cannot be shown."
    became = {"failed": "The run failed", "interrupted": "The run was interrupted"}.get(sources.record.status)
    why = f"{became} before it was evaluated" if became else "Nothing was evaluated in this run"
    return f"{why}: done are {done}."


def _policies(report: Mapping[str, Any]) -> list[str]:
    return [name for name in report.get("metrics", {}) if name != "reference"]


def _who(comparison: Comparison) -> tuple[str, str]:
    """What the two sides are called in a sentence."""
    new, old = (policy(str(comparison[who])) for who in ("candidate", "baseline"))
    return new, old


def _equals(written: str) -> str:
    return written if written.startswith("<") else f"= {written}"
