"""What of the rewards is in the cache key of a stage."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf.cache import fingerprint, plan
from rlhf.cache.plan import Planner
from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import ModelError
from rlhf.store.artifacts import Store


def ingredients(home: Path, rewards: dict[str, Any], stage: str = "ppo") -> dict[str, Any]:
    sections: dict[str, Any] = {
        "data": {"demonstrations": "d.jsonl"},
        "model": {"init": "random"},
        "judge": "off",
        "reward": "off",
        "ppo": {"rewards": rewards if stage == "ppo" else {"brevity": 1}},
        "evaluate": {"scorers": rewards if stage == "evaluate" else {}},
    }
    found = Planner(PipelineConfig.model_validate(sections), Store(home)).ingredients(stage, {})
    json.dumps(found)
    return found


def changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return plan.differences(old, new)


def test_weight_function_and_arguments_are_in_the_key(tmp_path: Path) -> None:
    def of(entry: Any) -> dict[str, Any]:
        return ingredients(tmp_path, {"keywords": entry})

    first = of({"arguments": {"words": ["a"]}})
    assert first["config.ppo.rewards.keywords.weight"] == 1.0
    assert first["config.ppo.rewards.keywords.function"] == "keywords"
    assert first["config.ppo.rewards.keywords.arguments.words"] == ["a"]
    assert changed(first, of({"arguments": {"words": ["b"]}})) == [
        "config.ppo.rewards.keywords.arguments.words: ['a'] -> ['b']"
    ]
    assert changed(first, of({"arguments": {"words": ["a"]}, "weight": 2})) == [
        "config.ppo.rewards.keywords.weight: 1.0 -> 2.0"
    ]
    assert changed(first, first) == []


def test_the_order_of_computed_columns_is_in_the_key(tmp_path: Path) -> None:
    """A later column may read an earlier one. The key of a single one is as it was."""

    def of(*names: str) -> dict[str, Any]:
        data = {
            "rows": [{"prompt": "p"}],
            "computed": {n: {"function": "word_count", "column": "prompt"} for n in names},
        }
        off = dict.fromkeys(("sft", "judge", "reward", "ppo", "evaluate"), "off")
        config = PipelineConfig.model_validate({**off, "data": data, "model": {"init": "random"}})
        return Planner(config, Store(tmp_path)).ingredients("prepare", {})

    assert changed(of("a", "b"), of("b", "a")) == ["config.data.computed, in order: ['a', 'b'] -> ['b', 'a']"]
    assert not any("in order" in name for name in of("a"))


@pytest.mark.parametrize("stage", ["ppo", "evaluate"])
def test_a_built_ins_code_and_libraries_are_in_the_key_of_who_uses_it(stage: str, tmp_path: Path) -> None:
    found = ingredients(tmp_path, {"exact_word_count": {}}, stage)
    code = {name for name in found if name.startswith("function exact_word_count: ")}
    assert {f"function exact_word_count: rlhf/{name}.py" for name in ("rewards/builtin", "metrics/word_count")} <= code
    assert "library spacy" in found
    other = ingredients(tmp_path, {"pep8": {}}, stage)
    assert "library pycodestyle" in other
    assert "library spacy" not in other
    plain = Planner(
        PipelineConfig.model_validate(
            {"data": {"demonstrations": "d", "preferences": "p"}, "model": {"init": "random"}}
        ),
        Store(tmp_path),
    ).ingredients(stage, {})
    assert not any("builtin" in name or "spacy" in name for name in plain)
    assert "code rlhf/rewards/model.py" in plain


def test_all_of_the_package_is_fingerprinted_by_who_uses_it() -> None:
    names = {f"rlhf.rewards.{name}" for name in ("functions", "model", "weighted", "registry")}
    assert names <= set(fingerprint.import_closure("rlhf.ppo.stage"))
    assert "rlhf.rewards.builtin" in fingerprint.import_closure("rlhf.rewards.builtin_models")


def test_a_file_or_folder_counts_by_content(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("def f(prompts, responses, **more): ...\n")
    words, other, folder = tmp_path / "words.txt", tmp_path / "other.txt", tmp_path / "folder"
    folder.mkdir()
    for path in (words, other, folder / "x"):
        path.write_text("a\n")

    def of(**arguments: Any) -> dict[str, Any]:
        return ingredients(tmp_path, {"mine": {"function": f"{tmp_path}/r.py:f", "arguments": arguments}})

    first = of(file=str(words), files=[str(words), "text"], folder=str(folder), n=1)
    assert str(words) not in json.dumps([value for name, value in first.items() if "arguments" in name])
    assert first == of(file=str(other), files=[str(other), "text"], folder=str(folder), n=1)
    for path, name in ((words, "file"), (folder / "x", "folder")):
        path.write_text("b\n")
        os.utime(path)
        second = of(file=str(words), files=[str(words), "text"], folder=str(folder), n=1)
        assert any(line.startswith(f"config.ppo.rewards.mine.arguments.{name}:") for line in changed(first, second))
        first = second
    (tmp_path / "r.py").write_text("def f(prompts, responses, **more): return 1\n")
    changes = changed(first, of(file=str(words), files=[str(words), "text"], folder=str(folder), n=1))
    assert changes == [f"function {tmp_path}/r.py:f: r.py changed"]


def test_a_built_ins_model_counts_by_content_or_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text("{}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("rlhf.store.hub.resolve_commit", lambda name, revision, option: "c0ffee")

    def of(model: str) -> Any:
        found = ingredients(tmp_path, {"semantic_similarity": {"arguments": {"model": model}}})
        return found["config.ppo.rewards.semantic_similarity.arguments.model"]

    assert len(of(str(tmp_path / "encoder"))) == 64
    assert of("org/encoder") == "org/encoder@c0ffee"

    def nowhere(name: str, revision: str | None, option: str) -> str:
        raise ModelError(f"set {option}")

    monkeypatch.setattr("rlhf.store.hub.resolve_commit", nowhere)
    with pytest.raises(ModelError, match=r"^set ppo\.rewards\.semantic_similarity\.arguments\.model$"):
        of("org/encoder")
