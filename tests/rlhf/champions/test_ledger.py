"""How the champion changes and goes back, what is kept of it, and what counts as news."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from rlhf.cache.plan import StagePlan
from rlhf.champions import ledger as champion
from rlhf.champions.ledger import Considered, Contender, news
from rlhf.errors import ArtifactError, ConfigError
from rlhf.store.artifacts import Manifest, Store


def contender(name: str, **keys: str) -> Contender:
    return Contender(name, keys or {"ppo": name})


A, B, C = contender("a"), contender("b"), contender("c")


def promote(home: Path, new: Contender, over: Contender | None) -> None:
    champion.promote(home, "demo", new, over=over, who="ann", why=("better", "surely"))


def test_who_when_why_and_over_whom_are_kept(tmp_path: Path) -> None:
    assert champion.champion(tmp_path, "demo") is None
    assert champion.history(tmp_path, "demo").line == ()
    promote(tmp_path, A, None)
    champion.promote(tmp_path, "demo", B, over=A, who="bob", why=("because",), forced=True)
    assert champion.champion(tmp_path, "demo") == B
    first, second = champion.history(tmp_path, "demo").changes
    assert (first.event, first.champion, first.previous, first.who, first.why) == (
        "promoted",
        A,
        None,
        "ann",
        ("better", "surely"),
    )
    assert (second.event, second.champion, second.previous, second.who) == ("forced", B, "a", "bob")
    assert 0 < first.when <= second.when
    assert champion.champion(tmp_path, "other") is None
    assert champion.pipelines(tmp_path) == ["demo"]


def test_the_way_back_leads_from_champion_to_champion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'demo' has no champion"):
        champion.roll_back(tmp_path, "demo", who="ann", why=())
    for new, over in ((A, None), (B, A), (C, B)):
        promote(tmp_path, new, over)
    change = champion.roll_back(tmp_path, "demo", who="cy", why=("complaints",))
    assert (change.event, change.champion, change.previous, change.who) == ("rolled back", B, "c", "cy")
    assert champion.champion(tmp_path, "demo") == B
    promote(tmp_path, C, B)  # again
    assert champion.history(tmp_path, "demo").line == (A, B, C)
    for expected in (B, A):
        champion.roll_back(tmp_path, "demo", who="cy", why=())
        assert champion.champion(tmp_path, "demo") == expected
    with pytest.raises(ConfigError, match="no champion before run a"):
        champion.roll_back(tmp_path, "demo", who="cy", why=())
    assert len(champion.history(tmp_path, "demo").changes) == 7
    promote(tmp_path, B, A)
    assert champion.history(tmp_path, "demo").line == (A, B)
    with pytest.raises(ConfigError, match=r"'dmeo' has no champion; pipelines that have one: demo"):
        champion.roll_back(tmp_path, "dmeo", who="ann", why=())


def test_one_that_was_compared_with_another_champion_is_not_promoted(tmp_path: Path) -> None:
    promote(tmp_path, A, None)
    with pytest.raises(ConfigError, match="compared with no champion, but the champion of 'demo' is a now"):
        promote(tmp_path, B, None)
    with pytest.raises(ConfigError, match="compared with c, but the champion of 'demo' is a now"):
        promote(tmp_path, B, C)
    assert champion.champion(tmp_path, "demo") == A


def test_of_many_at_once_one_becomes_champion(tmp_path: Path) -> None:
    refused = []

    def run(name: str) -> None:
        try:
            promote(tmp_path, contender(name), None)
        except ConfigError:
            refused.append(name)

    threads = [threading.Thread(target=run, args=(f"run{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7
    assert len(champion.history(tmp_path, "demo").changes) == 1


def test_what_is_told_stays_told_until_something_changes(tmp_path: Path) -> None:
    promote(tmp_path, A, None)
    promote(tmp_path, B, A)
    champion.told(tmp_path, "demo", changes=1)
    assert champion.history(tmp_path, "demo").told == 1
    champion.roll_back(tmp_path, "demo", who="ann", why=())
    assert champion.history(tmp_path, "demo").told == 1
    champion.consider(tmp_path, "demo", Considered(C, False, ("worse",)))
    champion.told(tmp_path, "demo", candidate="b")  # another one was considered meanwhile
    assert champion.considered(tmp_path, "demo") == Considered(C, False, ("worse",), _when(tmp_path))
    champion.told(tmp_path, "demo", candidate="c")
    assert champion.considered(tmp_path, "demo") == Considered(C, False, ("worse",), _when(tmp_path), told=True)


def _when(home: Path) -> float:
    return float(json.loads((home / "candidates" / "demo.json").read_text())["when"])


@pytest.mark.parametrize("content", ["{", "{}", '{"changes": [{}], "told": 0}', "[]"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    promote(tmp_path, A, None)
    (tmp_path / "champions" / "demo.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"demo\.json is damaged"):
        champion.history(tmp_path, "demo")
    with pytest.raises(ArtifactError, match=r"demo\.json is damaged"):
        champion.artifacts_in_use(tmp_path)


def test_artifacts_of_champions_candidates_and_of_the_one_before_are_in_use(tmp_path: Path) -> None:
    assert champion.artifacts_in_use(tmp_path) == set()
    runs = [contender(name, sft="s", ppo=name) for name in ("a", "b", "c")]
    for new, over in zip(runs, [None, *runs], strict=False):
        promote(tmp_path, new, over)
    assert champion.artifacts_in_use(tmp_path) == {("sft", "s"), ("ppo", "b"), ("ppo", "c")}
    champion.consider(tmp_path, "demo", Considered(contender("d", ppo="d"), False, ()))
    champion.consider(tmp_path, "other", Considered(contender("e", sft="e"), False, ()))
    assert champion.artifacts_in_use(tmp_path) == {
        ("sft", "s"), ("ppo", "b"), ("ppo", "c"), ("ppo", "d"), ("sft", "e"),
    }  # fmt: skip
    champion.roll_back(tmp_path, "demo", who="ann", why=())
    assert ("ppo", "a") in champion.artifacts_in_use(tmp_path)  # one can go back to it now


def test_the_policy_of_a_run_is_its_last_one() -> None:
    assert contender("a", prepare="p", sft="s", reward="r", ppo="x").policy == ("ppo", "x")
    assert contender("a", prepare="p", sft="s").policy == ("sft", "s")
    assert contender("a", prepare="p").policy is None
    names = champion.registered_names("demo", contender("a", sft="s", reward="r", ppo="x"))
    assert names == {"ppo": "demo", "reward": "demo-reward"}
    assert champion.registered_names("demo", contender("a", sft="s")) == {"sft": "demo"}


def test_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_USER", "ann")
    assert champion.person() == "ann"
    monkeypatch.delenv("RLHF_USER")
    monkeypatch.setattr("getpass.getuser", lambda: "bob")
    assert champion.person() == "bob"

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert champion.person().startswith("user ")


def plan(stage: str, key: str | None, **ingredients: Any) -> StagePlan:
    return StagePlan(stage, "run", ("input prepare: will be made anew",), key, None, ingredients)


def remember(store: Store, stage: str, key: str, ingredients: dict[str, Any]) -> None:
    out = store.work_directory(stage, key) / "out"
    out.mkdir(parents=True)
    store.publish(out, Manifest(stage, key, "d", {}, {}, ingredients))


def test_news_names_what_changed_where_it_changed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    before = contender("run", prepare="a", sft="b", ppo="c")
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
