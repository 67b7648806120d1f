"""The report of a run: what it says, that it says it safely, whatever is missing, and always in the same bytes."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.report import Sources, words
from rlhf.report.page import page
from rlhf.report.samples import BYTES, CHARACTERS, samples
from rlhf.report.verdict import judgement, verdict
from tests.rlhf import report_sources as made
from tests.rlhf.report_sources import EVIL, LONG, STRANGE, N, Reader


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return made.sources(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def text(sources: Sources) -> str:
    return page(sources)


# --- safe, complete, the same


def test_model_text_runs_and_loads_nothing(text: str) -> None:
    found = Reader(text)
    assert found.tags.count("script") == 1
    assert "img" not in found.tags
    assert found.handlers == []
    assert all(link.startswith("#") for link in found.links)
    assert f"the ppo says 0 {EVIL}" in found.text
    assert not re.search(r"https?:|//[a-z]", text.replace("http-equiv", ""))


def test_the_policy_allows_the_pages_own_script_and_style_alone(text: str) -> None:
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    directives = dict(part.split(" ", 1) for part in policy.replace("&#39;", "'").split("; "))
    assert directives["default-src"] == "'none'"
    for kind in ("script", "style"):
        [content] = re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert directives[f"{kind}-src"] == f"'sha256-{digest}'"


def test_strange_characters_are_seen_and_can_be_written(tmp_path: Path) -> None:
    found = made.sources(tmp_path)
    config = dict(found.record.config) | {"name": STRANGE}
    record = dataclasses.replace(found.record, error=STRANGE + EVIL, status="failed", pipeline=STRANGE, config=config)
    written = page(dataclasses.replace(found, record=record, config=None)).encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", written.decode())
    shown = Reader(written.decode()).text
    for code in ("202E", "2028", "D800", "0007", "0000", "FFFE"):
        assert f"U+{code}" in shown


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain, é, 日本語, שלום, 👩‍👩‍👧", "plain, é, 日本語, שלום, 👩‍👩‍👧"),
        ("two\nlines\tand\r\na third", "two\nlines\tand\na third"),
        ("\u202eabc\u2069", "⟨U+202E⟩abc⟨U+2069⟩"),
        ("\ud83d", "⟨U+D83D⟩"),
        ("a\rb\x1b[31m\x85", "a⟨U+000D⟩b⟨U+001B⟩[31m⟨U+0085⟩"),
    ],
)
def test_what_cannot_be_seen_is_named(given: str, shown: str) -> None:
    assert words.visible(given) == shown


def test_the_same_sources_give_the_same_page_and_others_another(sources: Sources, text: str, tmp_path: Path) -> None:
    assert page(made.sources(tmp_path / "again")) == text
    assert page(made.sources(tmp_path / "other", made.evaluation(gold=(0.31, 0.1)))) != text


def test_ten_thousand_long_samples_stay_below_five_megabytes(tmp_path: Path) -> None:
    found = made.sources(tmp_path, table=made.samples(10_000, f"{EVIL} {LONG}"))
    text = page(found)
    assert len(text.encode()) < 5_000_000
    shown = samples(found)
    assert shown is not None
    assert 10 < len(shown.shown) < 400
    assert f"{len(shown.shown)} of 10,000 samples; all are in samples.parquet" in Reader(text).line
    assert sum(len(a.texts[0].encode()) for s in shown.shown for a in s.answers) <= BYTES
    assert "more characters]" in shown.shown[0].prompt
    assert len(shown.shown[0].prompt) < CHARACTERS + 40


# --- what it says


def test_the_summary_comes_first_and_has_its_numbers(text: str) -> None:
    line = Reader(text).line
    begin = line.index("PPO is better than SFT, by the held-out reward model and gold.")
    assert begin < line.index("Metrics", begin + 1)
    assert "PPO wins against SFT72 % [67, 77]by the held-out reward model; at equal length 70 % [64, 76]" in line
    assert "+0.80 [+0.60, +1.00]p < 0.001, effect size 0.42" in line
    assert "KL to SFT7.25 [6.75, 7.75]± 0.26 standard error; nats a response" in line
    assert "Over-optimisedno" in line
    assert "40 held-out prompts, sampled at temperature 0.7. Brackets are 95 % intervals" in line
    assert "nan" not in line.lower().replace("finance", "")
    assert "None" not in line


@pytest.mark.parametrize(
    "expected",
    [
        "Reward (trained on)",
        "brevityPPO against SFT90 %52 %",  # consistency, and preference for what is shown first
        "PPO against the references",
        "0.400 [0.380, 0.420] (n = 39)",  # fewer references than prompts
        "demonstrations9,000128,0000988",  # rows read, lost by reason, kept
        "All held-out pairs0.880 [0.840, 0.920]300",
        "Its confidence is off by 3.1 % on average; if it were right, so few pairs would show 2.4 % by chance.",
        "ppo124,439,808294,912497.76",
        "ppo.kl_coef0.40.05",  # setting, value, default
        "Stages were computed with different versions of numpy.",
        "prepare: model; sft: model; reward: model",  # what evaluate read
        "sftcached25.0 s",
        "1 more curve",
    ],
)
def test_it_says(text: str, expected: str) -> None:
    assert expected in Reader(text).line


def test_every_chart_has_a_table_behind_it(text: str) -> None:
    sections = re.findall(r"<section id=.*?</section>", text, re.DOTALL)
    checked = 0
    for section in sections:
        for figure in re.findall(r"<figure>.*?</figure>", section, re.DOTALL):
            assert figure.count('role="img"') == 1
            assert re.search(r"<svg[^>]*><title>[^<]+</title><desc>[^<]+</desc>", figure)
            before = section[: section.index(figure)]
            assert "<table>" in figure or "<table>" in before
            checked += 1
    assert checked >= 15


def test_all_stages_have_their_curves(text: str) -> None:
    for stage, title in (("sft", "Supervised fine-tuning"), ("reward", "Reward model: training"), ("ppo", "PPO")):
        assert f'<section id="curves-{stage}">\n<h2>{title}</h2>' in text
    assert "<figcaption>Judge: gold</figcaption>" in text


@pytest.mark.parametrize(
    ("reward", "held_out", "gold", "tone", "sentence"),
    [
        (1, 1, 1, "good", "PPO is better than SFT, by the held-out reward model and gold."),
        (0, 1, 1, "good", "PPO is better than SFT, by the held-out reward model and gold."),
        (-1, -1, -1, "bad", "PPO is worse than SFT by the held-out reward model and gold."),
        (1, 1, -1, "bad", "PPO has more reward than SFT, but is worse by gold: the reward was over-optimised."),
        (1, 0, 0, "open", "No clear difference between PPO and SFT by the held-out reward model and gold: each"),
        (1, 1, 0, "open", "PPO against SFT: better by the held-out reward model, not clearly different by gold."),
        (0, 1, -1, "open", "PPO against SFT: better by the held-out reward model, worse by gold."),
    ],
)
def test_judgement(reward: int, held_out: int, gold: int, tone: str, sentence: str) -> None:
    scores = {
        name: {"difference": made.estimate(float(sign), 0.5)}
        for name, sign in (("reward", reward), ("held_out", held_out), ("gold", gold))
    }
    found = judgement({"candidate": "ppo", "baseline": "sft", "scores": scores}, ["reward"])
    assert found[0] == tone
    assert found[1].startswith(sentence)


def test_what_it_was_trained_on_decides_nothing() -> None:
    scores = {"reward": {"difference": made.estimate(5.0, 0.1)}}
    tone, sentence = judgement({"candidate": "ppo", "baseline": "sft", "scores": scores}, ["reward"])
    assert (tone, sentence) == (
        "open",
        "PPO has more reward than SFT, but nothing judged it that it was not trained on.",
    )
    tone, sentence = judgement({"candidate": "ppo", "baseline": "reference", "scores": {}}, [])
    assert sentence.startswith("PPO and the references were not scored")


def test_an_alarm_is_in_the_summary_and_marked_in_the_chart(tmp_path: Path) -> None:
    report = made.evaluation(held_out=(-0.5, 0.1), gold=(-0.2, 0.1), alarm=True)
    text = page(made.sources(tmp_path, report))
    line = Reader(text).line
    assert "PPO has more reward than SFT, but is worse by the held-out reward model and gold" in line
    assert "Over-optimisedyesreward rose while it fell by the held-out reward model" in line
    assert "A triangle marks an evaluation at which the alarm was on." in line
    assert text.count('class="alarm"') == 2  # where all scores are, and where the held-out one is alone
    assert "(alarm)" in line


def test_better_with_an_alarm_is_not_simply_good(tmp_path: Path) -> None:
    assert verdict(made.sources(tmp_path / "one")).tone == "good"
    found = verdict(made.sources(tmp_path / "other", made.evaluation(alarm=True)))
    assert found.tone == "open"
    assert found.further[0].endswith("the held-out reward model fell: see Reward against KL.")


def test_an_evaluation_that_compared_otherwise_is_said_to_be_old(tmp_path: Path) -> None:
    report = {name: of for name, of in made.evaluation().items() if name != "comparisons"}
    assert "of an older version" in verdict(made.sources(tmp_path, report)).sentence


def test_samples_are_the_first_and_those_that_changed_most(sources: Sources) -> None:
    found = samples(sources)
    assert found is not None
    assert (found.before, found.after, found.total) == ("sft", "ppo", N)
    assert [sample.number for sample in found.shown[:3]] == [1, 2, 3]
    table = made.samples()
    change = [new - old for new, old in zip(table["ppo_held_out"], table["sft_held_out"], strict=True)]
    notable = {sample.why: sample.number - 1 for sample in found.shown if sample.why}
    assert change[notable["loss no. 1 by the held-out reward model"]] == min(change)
    assert change[notable["gain no. 1 by the held-out reward model"]] == max(change)
    assert sorted(sample.number for sample in found.shown) == list(range(1, N + 1))
    [references] = [answer.texts for answer in found.shown[0].answers if answer.who == "reference"]
    assert references == ["first 0", "second"]
    assert "reference" not in [answer.who for answer in found.shown[1].answers]  # it has none


# --- examples and people


def leaves(value: Any) -> Iterator[Any]:
    """Every value in a nested structure."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def test_the_example_is_as_report_json_is() -> None:
    assert None in list(leaves(made.evaluation()))  # it tries what is undefined
    assert json.loads(json.dumps(made.evaluation(), allow_nan=False)) == made.evaluation()


def test_what_people_said_is_there(sources: Sources, tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    reader = {
        "candidate": "ppo", "baseline": "sft", "rows": [{"prompt_row": row} for row in range(30)],
        "win_rate": made.estimate(0.7, 0.15, 30), "wins": 0.6, "ties": 0.2, "losses": 0.2,
        "agreement": {"reward": made.estimate(0.8, 0.1, 24), "held_out": made.estimate(math.nan, 0.0, 0)},
    }  # fmt: skip
    between = {
        "readers": [EVIL, "bo"],
        "rows": 28,
        "agreement": 0.75,
        "kappa": 0.5,
        "kappa_low": 0.2,
        "kappa_high": 0.8,
    }
    path.write_text(json.dumps({"run": "x", "readers": {EVIL: reader, "bo": reader}, "between": [between]}))
    line = Reader(page(dataclasses.replace(sources, verdicts=path))).line
    assert f"{EVIL}PPO against SFT70 % [55, 85]60 %20 %20 %30" in line
    assert "Reward80 % [70, 90]80 % [70, 90] Held-out reward––" in line
    assert f"{EVIL} and bo75 %0.50 [0.20, 0.80]28" in line
    path.write_text("{damaged")
    assert "without knowing which policy" not in Reader(page(dataclasses.replace(sources, verdicts=path))).line
