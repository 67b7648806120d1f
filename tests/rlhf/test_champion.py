"""Who becomes champion, and what counts as news."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf import champion
from rlhf.artifacts import Manifest, Store
from rlhf.champion import Contender, better_by, news
from rlhf.config import Promotion
from rlhf.errors import ArtifactError
from rlhf.plan import StagePlan

METRIC = "evaluate/ppo/reward"


def contender(value: float | None = None, **keys: str) -> Contender:
    return Contender("run", keys, {} if value is None else {METRIC: value})


@pytest.mark.parametrize(
    ("candidate", "holder", "rule", "promote", "reason"),
    [
        (contender(1.0), None, {}, True, "no champion yet"),
        (contender(), None, {}, False, "was not measured"),
        (contender(float("nan")), None, {}, False, "was not measured"),
        (contender(1.2), contender(1.0), {}, True, "the gain 0.2 is over the margin 0"),
        (contender(1.0), contender(1.0), {}, False, "the gain 0 is not over the margin 0"),
        (contender(1.2), contender(1.0), {"margin": 0.3}, False, "1 of the champion, 1.2 of the candidate"),
        (contender(1.2), contender(1.0), {"lower_is_better": True}, False, "the gain -0.2"),
        (contender(0.8), contender(1.0), {"lower_is_better": True}, True, "the gain 0.2"),
        (contender(0.1), contender(), {}, True, "the champion was not measured"),
    ],
)
def test_the_gate(
    candidate: Contender, holder: Contender | None, rule: dict[str, Any], promote: bool, reason: str
) -> None:
    verdict = better_by(Promotion(metric=METRIC, **rule))(candidate, holder)
    assert verdict.promote is promote
    assert reason in verdict.reasons[0]


def test_written_and_read(tmp_path: Path) -> None:
    assert champion.read(tmp_path, "champions", "demo") is None
    held = Contender("run", {"ppo": "k"}, {METRIC: 1.0}, 12.5, ("better",))
    champion.write(tmp_path, "champions", "demo", held)
    assert champion.read(tmp_path, "champions", "demo") == held
    assert champion.read(tmp_path, "candidates", "demo") is None
    [path] = (tmp_path / "champions").iterdir()
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="damaged"):
        champion.read(tmp_path, "champions", "demo")


def test_what_champions_and_candidates_use(tmp_path: Path) -> None:
    assert champion.artifacts_in_use(tmp_path) == set()
    champion.write(tmp_path, "champions", "demo", contender(1.0, sft="a", ppo="b"))
    champion.write(tmp_path, "candidates", "demo", contender(0.5, sft="a", ppo="c"))
    champion.write(tmp_path, "champions", "other", contender(1.0, ppo="d"))
    assert champion.artifacts_in_use(tmp_path) == {("sft", "a"), ("ppo", "b"), ("ppo", "c"), ("ppo", "d")}
    (tmp_path / "champions" / "other.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"other\.json is damaged"):
        champion.artifacts_in_use(tmp_path)


def plan(stage: str, key: str | None, **ingredients: Any) -> StagePlan:
    return StagePlan(stage, "run", ("input prepare: will be made anew",), key, None, ingredients)


def remember(store: Store, stage: str, key: str, ingredients: dict[str, Any]) -> None:
    out = store.work_directory(stage, key) / "out"
    out.mkdir(parents=True)
    store.publish(out, Manifest(stage, key, "d", {}, {}, ingredients))


def test_news_names_what_changed_where_it_changed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    before = contender(prepare="a", sft="b", ppo="c")
    remember(store, "prepare", "a", {"data.prompts[0] x.jsonl": "1" * 64, "config.seed": 0})
    remember(store, "ppo", "c", {"config.ppo.kl_coef": 0.1, "input sft/model": "m"})
    same = [plan("prepare", "a"), plan("sft", "b"), plan("ppo", "c")]
    assert news(store, before, same) == []
    changed = [
        plan("prepare", "z", **{"data.prompts[0] x.jsonl": "2" * 64, "config.seed": 0}),
        plan("sft", None),
        plan("ppo", "y", **{"config.ppo.kl_coef": 0.2, "input sft/model": "n"}),
    ]
    assert news(store, before, changed) == [
        "prepare: data.prompts[0] x.jsonl: 1111.. -> 2222..",
        "sft: input prepare: will be made anew",
        "ppo: config.ppo.kl_coef: 0.1 -> 0.2",
    ]
    assert news(store, before, same[:2]) == ["ppo: is off now"]
    assert news(store, None, same) == ["there is no champion yet"]
