"""Kinds of data, conversations, computed columns, stated splits, and what becomes of bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rlhf.config.pipeline import PipelineConfig
from rlhf.context import Context
from rlhf.errors import ConfigError, DataError
from rlhf.prepare import chat, computed
from rlhf.prepare.settle import split_of
from rlhf.prepare.sources import SPLITS
from rlhf.prepare.stage import run
from rlhf.prepare.tokens import train_tokenizer
from rlhf.tracking.tracker import NullTracker

OFF: dict[str, Any] = dict.fromkeys(("sft", "judge", "reward", "ppo", "evaluate"), "off")
MODEL = {"init": "random", "layers": 1, "width": 8, "heads": 2, "vocab_size": 300, "context": 512}


class Prepared:
    """The stage's output for some settings of ``data``; ``rows`` are all splits together."""

    def __init__(self, folder: Path, **data: Any) -> None:
        out = folder / "out"
        out.mkdir()
        fractions = {"validation_fraction": 0.0, "test_fraction": 0.0}
        config = PipelineConfig.model_validate({**OFF, "model": MODEL, "data": fractions | data})
        self.finals = run(Context("prepare", config, {}, out, folder / "work", NullTracker()))
        self.out, self.report = out, json.loads((out / "report.json").read_text("utf-8"))

    def rows(self, kind: str, *splits: str) -> list[dict[str, Any]]:
        paths = [self.out / kind / f"{split}.parquet" for split in splits or SPLITS]
        return [row for path in paths for row in pq.read_table(path).to_pylist()]

    def row(self, kind: str) -> dict[str, Any]:
        (row,) = self.rows(kind)
        return row


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def say(*turns: str) -> list[dict[str, str]]:
    """Messages from turns such as ``"user: hello"``."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def error_of(folder: Path, **data: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        Prepared(folder, **data)
    assert list((folder / "out").iterdir()) == []
    assert not (folder / "work" / "prepare").exists()
    return str(caught.value)


# --------------------------------------------------------------------------------------------------------------- kinds
def test_rows_in_the_configuration(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "response": "b"},
        {"prompt": "c", "chosen": "d", "rejected": "e"},
        {"prompt": "f"},
        {"prompt": "g", "response": "h", "score": 0.5},
    ]
    made = Prepared(tmp_path, rows=rows)
    assert made.row("demonstrations") == rows[0]
    assert made.row("preferences") == rows[1]
    assert made.row("prompts") == rows[2]
    assert made.row("ratings") == rows[3]


def test_rows_beside_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}])
    made = Prepared(tmp_path, demonstrations=path, rows=[{"prompt": "c", "response": "d"}])
    assert {row["prompt"] for row in made.rows("demonstrations")} == {"a", "c"}
    again = {"demonstrations": path, "rows": [{"prompt": "a", "response": "b"}]}
    (tmp_path / "b").mkdir()
    assert f"data.rows row 1: has the same prompt and response as {path} line 1" in error_of(tmp_path / "b", **again)


def test_margins(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "better": 2}]
    made = Prepared(tmp_path, rows=rows, columns={"margin": "better"})
    assert made.row("preferences") == {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2.0}


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "a", "rejected": "b", "responses": "one", "ranks": [1], "margin": "wide", "difference": 3},
        {"chosen": "a", "rejected": "b", "ranking": "first", "responses": ["x", "y"]},
        {"responses": ["a", "b"], "rejected": "c", "ranking": "first", "margin": "wide"},
    ],
)
def test_other_columns_do_not_come_along_under_names_with_a_meaning(row: dict[str, Any], tmp_path: Path) -> None:
    made = Prepared(tmp_path, preferences=write(tmp_path / "a.jsonl", [{"prompt": "p", "n": 1, **row}]))
    found = made.row("preferences")
    assert found.pop("ranking", 0) == 0
    assert found == {"prompt": "p", "chosen": "a", "rejected": "b", "n": 1}


def test_ratings_in_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,response,score,who\nq,a,0.5,x\nq,a,-1e3,y\nq,b,7,\n")
    made = Prepared(tmp_path, ratings=str(tmp_path / "a.csv"))
    found = {(row["response"], row["score"], row["who"]) for row in made.rows("ratings")}
    assert found == {("a", 0.5, "x"), ("a", -1000.0, "y"), ("b", 7.0, None)}


@pytest.mark.parametrize("score", ["high", "", "nan", "inf", None])
def test_bad_scores(score: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"prompt,response,score\nq,a,{score or ''}\n")
    assert "line 2, column 'score'" in error_of(tmp_path, ratings=str(tmp_path / "a.csv"))


def test_pairs_of_labelled_texts(tmp_path: Path) -> None:
    rows = [{"text": f"good {i}", "label": 1} for i in range(30)] + [
        {"text": f"bad {i}", "label": 0} for i in range(20)
    ]
    made = Prepared(
        tmp_path, labelled=write(tmp_path / "a.jsonl", rows), labels={"chosen": [0], "rejected": [1]},
        test_fraction=0.3,
    )  # fmt: skip
    pairs = made.rows("preferences")
    assert all(row["prompt"] == "" and row["chosen"].startswith("bad") for row in pairs)
    assert all(row["rejected"].startswith("good") for row in pairs)
    for split in SPLITS:
        for row in made.rows("preferences", split):
            assert {split_of(row[side], 0.0, 0.3) for side in ("chosen", "rejected")} == {split}
    texts = [row[side] for row in pairs for side in ("chosen", "rejected")]
    assert len(set(texts)) == len(texts)
    found = made.report["labelled"]
    assert found["lost"]["unpaired"] == 50 - 2 * len(pairs) > 0
    assert found["written_to"] == "preferences"


def test_labels_in_a_csv_file_are_those_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("review,stars\nfine,1\nawful,0\n")
    columns = {"text": "review", "label": "stars"}
    made = Prepared(tmp_path, labelled=str(tmp_path / "a.csv"), columns=columns)
    assert made.row("preferences") == {"prompt": "", "chosen": "fine", "rejected": "awful"}
    (tmp_path / "a.csv").write_text("review,stars\nfine,1\nawful,2\n")
    (tmp_path / "b").mkdir()
    message = error_of(tmp_path / "b", labelled=str(tmp_path / "a.csv"), columns=columns)
    assert "a.csv line 3: the label '2' is neither in data.labels.chosen nor rejected (1, 0)" in message


# ------------------------------------------------------------------------------------------------------- conversations
def test_a_conversation_as_demonstration(tmp_path: Path) -> None:
    talk = say("system: Be brief.", "user: Hello?", "assistant: Hi.", "user: Bye?", "assistant: Bye.")
    made = Prepared(tmp_path, rows=[{"messages": talk}])
    assert made.row("demonstrations") == {
        "prompt": "System: Be brief.\n\nUser: Hello?\n\nAssistant: Hi.\n\nUser: Bye?\n\nAssistant:\n",
        "response": "Bye.",
    }


def test_conversations_as_a_pair(tmp_path: Path) -> None:
    """Both sides hold the prompt (UltraFeedback), or the prompt has a column of its own."""
    question = say("user: 1 + 1?")
    rows: list[dict[str, Any]] = [
        {"chosen": question + say("assistant: 2"), "rejected": question + say("assistant: 3")},
        {"prompt": say("user: 2 + 2?"), "chosen": say("assistant: 4"), "rejected": say("assistant: 5")},
        {
            "prompt": "3 + 3?",
            "chosen": say("user: 3 + 3?", "assistant: 6"),
            "rejected": say("user: 3 + 3?", "assistant: 7"),
        },
    ]
    for number, row in enumerate(rows):
        folder = tmp_path / str(number)
        folder.mkdir()
        made = Prepared(folder, preferences=write(folder / "a.jsonl", [row])).row("preferences")
        sum_ = 2 * (number + 1)
        assert made["prompt"] == f"User: {number + 1} + {number + 1}?\n\nAssistant:\n"
        assert (made["chosen"], made["rejected"]) == (str(sum_), str(sum_ + 1))


def test_conversations_in_parquet(tmp_path: Path) -> None:
    from datasets import Dataset

    row = {"prompt": say("user: a"), "response": say("assistant: b")}
    Dataset.from_list([row]).to_parquet(str(tmp_path / "a.parquet"))
    made = Prepared(tmp_path, demonstrations=str(tmp_path / "a.parquet"))
    assert made.row("demonstrations") == {"prompt": "User: a\n\nAssistant:\n", "response": "b"}


def test_plain_prompts_as_messages(tmp_path: Path) -> None:
    made = Prepared(tmp_path, rows=[{"prompt": "a", "response": "b"}], chat="simple", prompt_template="Say {prompt}!")
    assert made.row("demonstrations") == {"prompt": "User: Say a!\n\nAssistant:\n", "response": "b"}


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"messages": []}, "holds no message"),
        ({"messages": [{"role": "user"}]}, "message 1, is not of the form"),
        ({"messages": say("usr: a", "assistant: b")}, "has the role 'usr'; must be one of system, user"),
        ({"messages": say("user: a", "assistant:  ")}, "message 2 has the content ' '"),
        ({"messages": say("assistant: a", "user: b")}, "the last message is of the user; must be of the assistant"),
        ({"messages": say("assistant: a")}, "there is no prompt"),
        ({"chosen": say("user: a", "assistant: b"), "rejected": say("user: x", "assistant: c")}, "differ before"),
        ({"chosen": say("user: a", "assistant: b"), "rejected": say("user: a", "assistant: b")}, "the same text 'b'"),
    ],
)
def test_bad_conversations(row: dict[str, Any], fragment: str, tmp_path: Path) -> None:
    kind = "demonstrations" if "messages" in row else "preferences"
    message = error_of(tmp_path, **{kind: write(tmp_path / "a.jsonl", [row])})
    assert fragment in message
    assert "line 1" in message


def test_the_models_own_template() -> None:
    tokenizer = train_tokenizer(["some words"], 260, 64)
    each = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template = each + "{% if add_generation_prompt %}<answer>{% endif %}"
    assert chat.make_template("auto", tokenizer)(say("user: hi")) == "<user>hi<answer>"
    assert chat.make_template("simple", tokenizer)(say("user: hi")) == "User: hi\n\nAssistant:\n"
    tokenizer.chat_template = None
    assert chat.make_template("auto", tokenizer) is chat.simple_template
    with pytest.raises(ConfigError, match="has no chat template"):
        chat.make_template("model", tokenizer)


# --------------------------------------------------------------------------------------------------- computed columns
def test_first_words() -> None:
    assert computed.first_words(["a b  c d", "a", " a\nb c"], 2) == ["a b", "a", " a\nb"]


def test_draw_is_even_and_always_the_same() -> None:
    texts = [f"text {i}" for i in range(6000)]
    drawn = computed.draw(texts, (1, 2, 3))
    assert drawn == computed.draw(texts, (1, 2, 3))
    for value in (1, 2, 3):
        assert drawn.count(value) == pytest.approx(2000, abs=130)  # 3.5 standard deviations


def test_computed_columns_in_the_template_and_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def shout(text, **others):\n    return [t.upper() + str(len(others)) for t in text]\n"
    )
    made = Prepared(
        tmp_path,
        rows=[{"text": "one two three", "prompt": "x"}],
        computed={
            "opening": {"function": "first_words", "column": "text", "count": 2},
            "loud": {"function": f"{tmp_path}/mine.py:shout"},
            "target": {"function": "draw", "column": "text", "values": [7]},
        },
        prompt_template="{opening} ({target})",
    )
    row = made.row("prompts")
    assert row == {
        "prompt": "one two (7)", "text": "one two three", "opening": "one two", "loud": "ONE TWO THREE2", "target": 7
    }  # fmt: skip


def test_a_function_that_fails_is_named_with_its_rows(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def half(n):\n    return [10 // k for k in n]\n")
    path = write(tmp_path / "a.jsonl", [{"prompt": f"p{n}", "n": n} for n in (1, 0, 2)])
    half = {"h": {"function": f"{tmp_path}/mine.py:half"}}
    message = error_of(tmp_path, prompts=path, computed=half)
    assert f"{path} line 2, computed column 'h': the function" in message
    assert "ZeroDivisionError" in message
    assert "1 row is bad" in message
    (tmp_path / "b").mkdir()
    missing = {"h": {"function": "first_words", "column": "txt", "count": 1}}
    assert "reads the column 'txt'" in error_of(tmp_path / "b", prompts=path, computed=missing)


# --------------------------------------------------------------------------------------------------------- bad rows
def test_bad_rows_are_kept_with_their_reasons(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "a", "response": "b"}',
        "{oops",
        '{"prompt": " ", "response": "c"}',
        '{"prompt": 1, "response": "d"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    made = Prepared(tmp_path, demonstrations=str(path), bad_rows="skip")
    found = made.report["demonstrations"]
    assert (found["rows"], found["kept"]) == (4, 1)
    assert found["lost"] == {"duplicate": 0, "over_limit": 0, "bad": 2, "empty": 1, "too_long": 0}
    assert made.finals["prepare/demonstrations_lost"] == 3
    kept = [json.loads(line) for line in (made.out / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["place"], row["reason"]) for row in kept] == [
        (f"{path} line 2", "bad"),
        (f"{path} line 3, column 'prompt'", "empty"),
        (f"{path} line 4, column 'prompt'", "bad"),
    ]
    assert kept[0]["row"] == "{oops"
    assert kept[2]["row"] == {"prompt": 1, "response": "d"}


# -------------------------------------------------------------------------------------------------------------- splits
def test_a_source_may_say_its_split(tmp_path: Path) -> None:
    train = [{"prompt": f"p{i}", "response": "r"} for i in range(20)]
    test = [{"prompt": f"p{i}", "response": "other"} for i in range(15, 25)]
    others = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(14, 18)]
    made = Prepared(
        tmp_path,
        demonstrations=[write(tmp_path / "a.jsonl", train) + "#train", write(tmp_path / "b.jsonl", test) + "#test"],
        preferences=write(tmp_path / "c.jsonl", others),
    )
    assert {row["prompt"] for row in made.rows("demonstrations", "train")} == {f"p{i}" for i in range(15)}
    assert {row["prompt"] for row in made.rows("demonstrations", "test")} == {f"p{i}" for i in range(15, 25)}
    assert made.report["demonstrations"]["lost"]["leaked"] == 5
    assert {row["prompt"] for row in made.rows("preferences", "test")} == {"p15", "p16", "p17"}
    assert {row["prompt"] for row in made.rows("preferences", "train")} == {"p14"}


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("hub:", "names no dataset"),
        ("hub:a/b/c", "names no dataset"),
        ("hub:a/b?splt=train", "the option 'splt'; known are config, split and revision"),
        ("hub:a/b?split=", "the option 'split' without a value"),
    ],
)
def test_names_of_hub_datasets(name: str, fragment: str, tmp_path: Path) -> None:
    assert fragment in error_of(tmp_path, prompts=name)


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the two calls that need a network answered here."""
    import datasets

    from rlhf.store import hub

    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        asked.append((args, options))
        return datasets.Dataset.from_list([{"prompt": f"p{i}"} for i in range(3)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "_ask", lambda name, revision, kind: ("c" * 40, kind))
    made = Prepared(tmp_path, prompts="hub:owner/name?config=x&split=test&revision=refs/convert/parquet")
    assert {row["prompt"] for row in made.rows("prompts")} == {"p0", "p1", "p2"}
    assert asked == [(("owner/name", "x"), {"split": "test", "revision": "c" * 40})]


def test_a_dataset_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    message = error_of(tmp_path, prompts="hub:owner/nothing-like-it")
    assert message.startswith("data.prompts: dataset 'owner/nothing-like-it' (revision main) cannot be fetched")
    assert "datasets--owner--nothing-like-it" in message
    assert "Name local files with the same columns" in message
