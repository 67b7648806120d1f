"""The first stage: splits, duplicates, limits, prompts, tokenizer, model, and files that are the same every time."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from rlhf.config import yaml_files as settings
from rlhf.context import Context
from rlhf.errors import DataError, InputError
from rlhf.models.loading import load_tokenizer
from rlhf.prepare.settle import split_of
from rlhf.prepare.sources import SPLITS
from rlhf.prepare.stage import check, run
from rlhf.prepare.tokens import END, Lengths, context_length, statistics, train_tokenizer
from rlhf.tracking.tracker import NullTracker
from tests.rlhf.projects import ROWS, good, replace


class Prepared:
    """One run of the stage."""

    def __init__(self, config: Path, out: Path, *overrides: str) -> None:
        out.mkdir()
        self.out = out
        self.config = settings.load(config, overrides=overrides)
        self.finals = run(Context("prepare", self.config, {}, out, out.with_suffix(".work"), NullTracker()))
        self.report = json.loads((out / "report.json").read_text("utf-8"))

    def rows(self, kind: str, *splits: str) -> list[dict[str, Any]]:
        paths = [self.out / kind / f"{split}.parquet" for split in splits or SPLITS]
        return [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]

    def digests(self) -> dict[str, str]:
        """sha256 of every file but the report, which names the files that were read."""
        files = (path for path in sorted(self.out.rglob("*")) if path.is_file() and path.name != "report.json")
        return {str(path.relative_to(self.out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return good(tmp_path)


@pytest.fixture
def prepared(project: Path, tmp_path: Path) -> Prepared:
    return Prepared(project, tmp_path / "out")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


# --- what it writes


def test_files_and_finals(prepared: Prepared) -> None:
    kinds = ("demonstrations", "preferences", "prompts")
    expected = {f"{kind}/{split}.parquet" for kind in kinds for split in SPLITS}
    assert expected <= set(prepared.digests())
    for kind in kinds:
        assert len(prepared.rows(kind)) == ROWS == prepared.report[kind]["rows"]
        for split in SPLITS:
            count = len(prepared.rows(kind, split))
            assert prepared.finals[f"prepare/{kind}_{split}"] == count == prepared.report[kind]["splits"][split]
            assert count > 0
    assert all(isinstance(value, float) for value in prepared.finals.values())


def test_columns(prepared: Prepared) -> None:
    assert prepared.rows("demonstrations")[0].keys() == {"prompt", "response"}
    assert list(prepared.rows("prompts")[0]) == ["prompt", "reference", "n"]
    assert list(prepared.rows("preferences")[0]) == ["prompt", "chosen", "rejected", "anna", "ben"]
    for row in prepared.rows("prompts"):
        assert row["prompt"] == f"What is {row['n']} times 2?"
        assert row["reference"] == f"It is {2 * row['n']}."


def test_other_names_of_columns(project: Path, tmp_path: Path) -> None:
    rows = [{"post": f"text {i}", "sub": i % 3, "prompt": "unused", "tldr": f"t{i}"} for i in range(ROWS)]
    write_rows(tmp_path / "demonstrations.jsonl", rows)
    template = 'data.prompt_template="r/{sub}: {post}\\n{{TL;DR}}:"'
    made = Prepared(
        project, tmp_path / "out", template, "data.columns.response=tldr", "data.prompts=", "data.preferences=",
        "judge=off", "reward=off", "ppo=off",
    )  # fmt: skip
    by_response = {row["response"]: row for row in made.rows("demonstrations")}
    assert by_response["t5"] == {"prompt": "r/2: text 5\n{TL;DR}:", "response": "t5", "post": "text 5", "sub": 2}
    made = Prepared(
        project, tmp_path / "out2", "data.columns.prompt=post", "data.columns.response=tldr", "data.prompts=",
        "data.preferences=", "judge=off", "reward=off", "ppo=off",
    )  # fmt: skip
    assert {"prompt": "text 5", "response": "t5", "sub": 2} in made.rows("demonstrations")


def test_prompts_of_the_demonstrations(project: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"p{i // 2}", "response": f"r{i}", "reference": "unused", "n": i} for i in range(ROWS)
    ]
    write_rows(tmp_path / "demonstrations.jsonl", rows)
    made = Prepared(project, tmp_path / "out", "data.prompts=")
    prompts = made.rows("prompts")
    assert sorted(row["prompt"] for row in prompts) == sorted({row["prompt"] for row in rows})
    for row in prompts:
        assert row.keys() == {"prompt", "reference", "references", "n"}
        assert (row["prompt"], row["reference"]) == (f"p{row['n'] // 2}", f"r{row['n']}")
    assert made.report["prompts"]["lost"]["duplicate"] == ROWS // 2
    for split in SPLITS:  # in the order of the demonstrations, with the first response to each prompt
        of: dict[str, list[str]] = {}
        for row in made.rows("demonstrations", split):
            of.setdefault(row["prompt"], []).append(row["response"])
        assert [(row["prompt"], row["references"]) for row in made.rows("prompts", split)] == list(of.items())


def test_only_preferences(project: Path, tmp_path: Path) -> None:
    off = ("sft=off", "ppo=off", "evaluate=off", "data.demonstrations=", "data.prompts=")
    made = Prepared(project, tmp_path / "out", *off)
    assert {path.name for path in made.out.iterdir()} == {"preferences", "base", "report.json"}
    assert made.finals["prepare/tokens_response_mean"] > 0


def test_check_writes_nothing(project: Path, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    kinds, tokenizer = check(settings.load(project))
    assert set(kinds) == {"demonstrations", "prompts", "preferences"}
    assert len(tokenizer) == 300
    assert set(tmp_path.rglob("*")) == before


# --- the same input gives the same files


def test_the_same_files_again(project: Path, prepared: Prepared, tmp_path: Path) -> None:
    assert Prepared(project, tmp_path / "again").digests() == prepared.digests()


@pytest.mark.slow
def test_the_same_files_in_another_process(project: Path, prepared: Prepared, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.rlhf.prepare.test_stage import Prepared\n"
        "Prepared(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    environment = {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true", "PATH": ""}
    root = Path(__file__).parents[3]
    subprocess.run(
        [sys.executable, "-c", code, str(project), str(tmp_path / "other")], check=True, env=environment, cwd=root
    )
    other = {path.name: path.read_bytes() for path in (tmp_path / "other").rglob("*") if path.is_file()}
    assert other == {path.name: path.read_bytes() for path in prepared.out.rglob("*") if path.is_file()}


def test_order_and_files_do_not_matter(project: Path, prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    (tmp_path / "one.jsonl").write_text("".join(lines[:15]))
    (tmp_path / "two.jsonl").write_text("".join(lines[15:]))
    files = f"data.demonstrations=[{tmp_path}/one.jsonl, {tmp_path}/two.jsonl]"
    assert Prepared(project, tmp_path / "again", files).digests() == prepared.digests()


def test_the_seed_is_that_of_the_weights_only(project: Path, prepared: Prepared, tmp_path: Path) -> None:
    other = Prepared(project, tmp_path / "again", "seed=9").digests()
    changed = {name for name, digest in prepared.digests().items() if other[name] != digest}
    assert changed == {"base/model.safetensors"}


# --- splits


def test_split_of_known_prompts() -> None:
    """These must never change: data that was held out would be trained on."""
    known = ["test", "validation", "test", "train", "train", "train", "test", "test"]
    assert [split_of(f"prompt {i}", 0.2, 0.3) for i in range(8)] == known


def test_shares_of_the_splits() -> None:
    counts = dict.fromkeys(SPLITS, 0)
    for i in range(20_000):
        counts[split_of(f"prompt {i}", 0.05, 0.1)] += 1
    assert counts["test"] == pytest.approx(2000, abs=150)  # 3.5 standard deviations
    assert counts["validation"] == pytest.approx(1000, abs=110)


def test_new_rows_move_no_old_ones(project: Path, prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.jsonl"
    more = [{"prompt": f"How is number {i}?", "response": "Fine."} for i in range(30)]
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in more))
    again = Prepared(project, tmp_path / "again")
    for split in SPLITS:
        old = {row["prompt"] for row in prepared.rows("demonstrations", split)}
        assert old <= {row["prompt"] for row in again.rows("demonstrations", split)}
    larger = Prepared(project, tmp_path / "larger", "data.validation_fraction=0.4")
    assert larger.rows("demonstrations", "test") == again.rows("demonstrations", "test")


def test_a_prompt_is_in_one_split_of_all_kinds(project: Path, tmp_path: Path) -> None:
    same = [f"shared prompt {i}" for i in range(ROWS)]
    write_rows(tmp_path / "demonstrations.jsonl", [{"prompt": p, "response": f"{i}"} for i, p in enumerate(same)])
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": p} for p in same])
    pairs = [{"prompt": p, "chosen": f"a{i}", "rejected": f"b{j}"} for i, p in enumerate(same) for j in range(2)]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    made = Prepared(
        project, tmp_path / "out", f"data.prompts={tmp_path}/prompts.jsonl", f"data.preferences={tmp_path}/pairs.jsonl",
        "judge.annotators=[]",
    )  # fmt: skip
    for split in SPLITS:
        found = [
            {row["prompt"] for row in made.rows(kind, split)} for kind in ("demonstrations", "prompts", "preferences")
        ]
        assert found[0] == found[1] == found[2]
        assert found[0] == {prompt for prompt in same if split_of(prompt, 0.2, 0.3) == split}


# --- losing rows


def test_duplicates_dropped(project: Path, tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.jsonl"
    path.write_text(path.read_text() * 2 + '{"prompt": "What is 7 plus 7?", "response": "Fourteen."}\n')
    made = Prepared(project, tmp_path / "out", "data.duplicates=drop")
    assert made.report["demonstrations"]["lost"] == {"duplicate": ROWS, "over_limit": 0, "too_long": 0}
    assert made.finals["prepare/demonstrations_lost"] == ROWS
    assert len(made.rows("demonstrations")) == ROWS + 1  # the same prompt with another response is no duplicate


def test_limits_take_the_first_by_hash(project: Path, prepared: Prepared, tmp_path: Path) -> None:
    limits = ("data.max_demonstrations=25", "data.max_preferences=30", "data.max_prompts=20")
    small = Prepared(project, tmp_path / "small", *limits)
    for kind, most in (("demonstrations", 25), ("preferences", 30), ("prompts", 20)):
        assert len(small.rows(kind)) == most
        assert small.report[kind]["lost"]["over_limit"] == ROWS - most
        for split in SPLITS:
            rows = small.rows(kind, split)
            assert rows == prepared.rows(kind, split)[: len(rows)]
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")
    assert Prepared(project, tmp_path / "reversed", *limits).digests() == small.digests()


def test_limited_splits_keep_their_shares(project: Path, tmp_path: Path) -> None:
    """The order must not be that of the split's own hash, or the first rows would all be test rows."""
    write_rows(tmp_path / "demonstrations.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(1000)])
    made = Prepared(project, tmp_path / "out", "data.max_demonstrations=300", "data.prompts=")
    assert made.finals["prepare/demonstrations_test"] == pytest.approx(90, abs=30)
    assert made.finals["prepare/demonstrations_train"] == pytest.approx(150, abs=35)


def test_too_long_dropped(project: Path, tmp_path: Path) -> None:
    replace(tmp_path / "demonstrations.jsonl", "What is 7 plus 7?", "word " * 99)
    replace(tmp_path / "pairs.csv", "It is 5.", "so " * 99)
    replace(tmp_path / "prompts.json", "What is 7 times 2?", "word " * 99)
    made = Prepared(project, tmp_path / "out", "data.too_long=drop", "data.max_prompt_tokens=30")
    for kind in ("demonstrations", "prompts", "preferences"):
        assert made.report[kind]["lost"] == {"duplicate": 0, "over_limit": 0, "too_long": 1}
        assert len(made.rows(kind)) == ROWS - 1
        assert made.report[kind]["tokens"]["prompt"]["max"] <= 30


def test_the_context_is_a_limit_to_the_token(project: Path, tmp_path: Path) -> None:
    made = Prepared(project, tmp_path / "out")
    tokenizer = load_tokenizer(made.out / "base")
    longest = max(
        len(tokenizer(row["prompt"])["input_ids"]) + len(tokenizer(row["response"])["input_ids"]) + 1
        for row in made.rows("demonstrations")
    )
    only = ("data.prompts=", "data.preferences=", "judge=off", "reward=off", "ppo=off", "evaluate.max_new_tokens=1")
    vocabulary = ("model.vocab_size=300",)
    Prepared(project, tmp_path / "fits", *only, *vocabulary, f"model.context={longest}")
    with pytest.raises(
        DataError, match=f"prompt and response: {longest} tokens, but the model's context is {longest - 1}"
    ):
        Prepared(project, tmp_path / "tight", *only, *vocabulary, f"model.context={longest - 1}")


def test_room_is_checked_even_when_long_rows_are_dropped(project: Path) -> None:
    overrides = ["ppo.max_new_tokens=60", "data.too_long=drop"]
    with pytest.raises(DataError, match=r"set data\.max_prompt_tokens: 4 and"):
        check(settings.load(project, overrides=overrides))
    kinds, _ = check(settings.load(project, overrides=[*overrides, "ppo=off"]))
    assert kinds["prompts"].kept == ROWS


@pytest.mark.parametrize("override", ["data.test_fraction=0", "data.test_fraction=0.75"])
def test_splits_that_no_stage_needs_may_be_empty(override: str, project: Path, tmp_path: Path) -> None:
    overrides = [override, "evaluate=off", "reward=off", "judge=off", "ppo.rewards={'a:b': 1}", "data.preferences="]
    made = Prepared(project, tmp_path / "out", *overrides, "data.validation_fraction=0")
    assert made.rows("demonstrations", "validation") == []
    schema = pq.read_schema(made.out / "demonstrations" / "validation.parquet")
    assert schema.equals(pq.read_schema(made.out / "demonstrations" / "train.parquet"))
    if override.endswith("=0"):
        assert made.rows("demonstrations", "test") == []


# --- tokens and models


def test_statistics_count_tokens(prepared: Prepared) -> None:
    tokenizer = load_tokenizer(prepared.out / "base")
    lengths = sorted(len(tokenizer(row["prompt"])["input_ids"]) for row in prepared.rows("prompts"))
    found = prepared.report["prompts"]["tokens"]["prompt"]
    assert (found["min"], found["max"]) == (lengths[0], lengths[-1])
    assert found["mean"] == pytest.approx(sum(lengths) / len(lengths)) == prepared.finals["prepare/tokens_prompt_mean"]
    responses = [len(tokenizer(row["response"])["input_ids"]) + 1 for row in prepared.rows("demonstrations")]
    assert prepared.finals["prepare/tokens_response_mean"] == pytest.approx(sum(responses) / len(responses))
    assert statistics(Lengths(tokenizer).of_prompts([])) == {}


def test_no_text_is_tokenized_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(["some words"], 260, 64)
    lengths = Lengths(tokenizer)
    seen: list[str] = []
    sizes = lengths._sizes

    def watched(texts: list[str]) -> list[int]:
        seen.extend(texts)
        return sizes(texts)

    monkeypatch.setattr(lengths, "_sizes", watched)
    assert lengths.of_prompts(["ab", "c", "ab"]).tolist() == [2, 1, 2]
    assert lengths.of_responses(["c", "def"]).tolist() == [2, 4]
    assert seen == ["ab", "c", "def"]


def test_the_trained_tokenizer(prepared: Prepared) -> None:
    tokenizer = load_tokenizer(prepared.out / "base")
    assert len(tokenizer) == 300 == prepared.finals["prepare/vocab_size"]
    assert tokenizer.eos_token == tokenizer.pad_token == tokenizer.bos_token == END
    for text in ("What is 7 plus 7?", " zwei  Leerzeichen\n\n", "日本語 🙂 \x00", "I 'm , n't ."):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids
    assert len(tokenizer("What")["input_ids"]) == 1  # learned from the training split


def test_the_tokenizer_sees_the_training_split_only(project: Path, prepared: Prepared, tmp_path: Path) -> None:
    held_out = [row["prompt"] for row in prepared.rows("demonstrations", "validation", "test")]
    assert held_out
    for i, prompt in enumerate(held_out):
        number = prompt.split()[2]
        replace(tmp_path / "demonstrations.jsonl", f'"response": "It is {2 * int(number)}."', f'"response": "zzzz{i}"')
    again = Prepared(project, tmp_path / "again").digests()
    assert again["base/tokenizer.json"] == prepared.digests()["base/tokenizer.json"]


def test_a_vocabulary_larger_than_the_texts_need() -> None:
    assert 257 < len(train_tokenizer(["a few words", "a few more"], 5000, 64)) < 300


def test_the_base_model_loads(prepared: Prepared) -> None:
    model = AutoModelForCausalLM.from_pretrained(prepared.out / "base")
    assert model.get_input_embeddings().weight.shape == (300, 8)
    assert context_length(prepared.config.model) == (64, False)


def test_a_pretrained_model(project: Path, prepared: Prepared, tmp_path: Path) -> None:
    path = ("model.init=pretrained", f"model.path={prepared.out}/base")
    made = Prepared(project, tmp_path / "again", *path)
    assert not (made.out / "base").exists()
    assert context_length(made.config.model) == (64, False)
    names = [name for name in prepared.digests() if not name.startswith("base")]
    assert made.digests() == {name: prepared.digests()[name] for name in names}
    replace(tmp_path / "demonstrations.jsonl", "What is 7 plus 7?", "word " * 99)
    with pytest.raises(InputError, match="the model's context is 64"):
        check(settings.load(project, overrides=path))


def test_a_word_without_an_end() -> None:
    """Uncut, training on a megabyte without a space did not end in three minutes."""
    for text in ("x" * 1_000_000, " " * 1_000_000):
        tokenizer = train_tokenizer([text, "a few words"], 300, 64)
        assert 0 < Lengths(tokenizer).of_responses([text])[0] < 1_000_000
