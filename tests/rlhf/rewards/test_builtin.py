"""Built-in rewards, against numbers that were worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel

from rlhf import rewards
from rlhf.errors import RewardError
from rlhf.metrics.word_count import word_count
from rlhf.rewards import registry

MakeModel = Callable[..., Path]


def score(
    name: str, responses: Sequence[str], columns: dict[str, list[Any]] | None = None, **given: Any
) -> list[float]:
    return rewards.make_scorer(name, given)([""] * len(responses), responses, columns or {})


def error_of(name: str, responses: Sequence[str], columns: dict[str, list[Any]], **given: Any) -> str:
    with pytest.raises(RewardError) as caught:
        score(name, responses, columns, **given)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ registry
def test_a_second_built_in_of_a_name_is_refused() -> None:
    registry.builtins()

    def brevity(prompts: Any, responses: Any) -> list[float]: ...
    def model(prompts: Any, responses: Any) -> list[float]: ...

    for function in (brevity, model):
        with pytest.raises(ValueError, match=f"a built-in reward '{function.__name__}' already"):
            registry.builtin()(function)
    assert registry.find("brevity").function is not brevity


def test_every_built_in_is_documented_and_takes_columns() -> None:
    docs = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text("utf-8")
    for name, builtin in registry.builtins().items():
        assert builtin.function.__doc__
        assert f"`{name}`" in docs
        assert all(f"`{argument}`" in docs for argument in builtin.defaults)
        assert "columns" in builtin.function.__code__.co_varnames


def test_looking_one_up_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "spacy", "pycodestyle", "pydantic", "datasets", "numpy"}
    assert not loaded_by("from rlhf.rewards import registry; registry.find('pep8').types") & heavy
    loaded = loaded_by("from rlhf.rewards import Rewards, make_scorer; make_scorer('pep8')")
    assert "torch" in loaded
    assert not loaded & {"spacy", "pycodestyle", "pydantic", "datasets"}


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a new process has after some code."""
    code += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


# -------------------------------------------------------------------------------------------------------------- length
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("  \n", 0),
        ("...!", 0),
        ("Hello, world!", 2),
        ("I don't  know.\n", 4),  # I, do, n't, know
        ("$5 -- it's 3.5%", 5),  # $, 5, it, 's, 3.5
        ("a-b e.g. U.S.A.", 4),
    ],
)
def test_words_are_spacys(text: str, words: int) -> None:
    assert word_count(text) == words


def test_exact_word_count() -> None:
    found = score("exact_word_count", ["one, two three.", "one two", "", "one"], {"target_words": [3, 3.0, "2", 11]})
    assert found == pytest.approx([1.0, 2 / math.exp(0.7) - 1, 2 / math.exp(1.4) - 1, 2 / math.exp(7.0) - 1])
    assert found[1] == pytest.approx(-0.00683, abs=1e-5)
    assert score("exact_word_count", ["one"], {"n": [1], "column": [5]}, column="n") == pytest.approx([1.0])


@pytest.mark.parametrize("bad", [None, "many", True, -1, math.nan])
def test_a_target_that_is_no_number_names_its_row(bad: Any) -> None:
    message = error_of("exact_word_count", ["a", "b"], {"target_words": [1, bad]})
    assert message.startswith("reward 'exact_word_count' raised ValueError: the column 'target_words' is ")
    assert "must be a number of words; on row 1: prompt '', response 'b'" in message


def test_a_column_that_is_not_there() -> None:
    message = error_of("exact_word_count", ["a"], {"x": [1], "y": [2]})
    assert "the data has no column 'target_words' (it has x, y); add it to the prompt files, or name another" in message


def test_brevity() -> None:
    assert score("brevity", ["", "one", " one  two,\nthree "]) == [0.0, -1.0, -3.0]


# --------------------------------------------------------------------------------------------------------------- words
def test_politeness() -> None:
    texts = [
        "hello",
        "Please!",
        "please please PLEASE",
        "Please, thank you",
        "Could you please wait, sorry? Thanks",
        "you stupid idiot",
        "please, idiot",
        "pleasesorry thanksgiving",
        "dumb, useless, pathetic, stupid",
    ]
    expected = [0, 1 / 3, 1 / 3, 2 / 3, 1, -2 / 3, 0, 0, -1]
    assert score("politeness", texts) == pytest.approx(expected)


def test_keywords() -> None:
    assert score("keywords", ["A cat; a DOG.", "cats", "dog"], words=["cat", "dog"]) == [1.0, 0.0, 0.5]
    assert score("keywords", ["room 12", "Room b", "12"], words=["room"], regex=r"\d+") == [1.0, 0.5, 0.5]
    assert score("keywords", ["c++ and New  York", "New York"], words=["C++", " new york"]) == [0.5, 0.5]
    assert score("keywords", ["x1"], {"words": [["y"]], "regex": ["("]}, words=["x1"]) == [
        1.0
    ]  # columns are no arguments


# ------------------------------------------------------------------------------------------------- against a reference
def test_similarity() -> None:
    columns = {"reference": ["the cat sat", "a b c d"], "other": ["x", "d c"]}
    responses = ["the cat", "b a d"]
    assert score("similarity", responses, columns) == pytest.approx([0.8, 2 * 2 / 7])  # L: b d
    assert score("similarity", responses, columns, metric="rouge1") == pytest.approx([0.8, 2 * 3 / 7])
    assert score("similarity", responses, columns, metric="rouge2") == pytest.approx([2 / 3, 0.0])
    assert score("similarity", responses, columns, column="other", metric="rouge1") == pytest.approx([0.0, 0.4])


@pytest.mark.parametrize("name", ["similarity", "factuality"])
@pytest.mark.parametrize("bad", [None, " ", 3])
def test_a_row_without_a_reference_is_named(name: str, bad: Any) -> None:
    message = error_of(name, ["a", "b"], {"reference": ["a", bad]})
    assert f"reward '{name}' raised ValueError: the column 'reference' is {bad!r} here; it must be a text" in message
    assert "on row 1" in message


def test_a_reference_that_rouge_cannot_read() -> None:
    assert "'日本' here, which has no letter a-z and no digit; on row 0" in error_of(
        "similarity", ["a"], {"reference": ["日本"]}
    )


def test_factuality() -> None:
    reference = "The Paris Games of 2024 cost 1,000 euros."  # paris, games, 2024, 1000
    pairs = [
        ("In 2024, the Games in Paris cost 1000.0 euros.", 1.0),
        ("The Games were in Paris.", 2 * 2 / (2 + 4)),
        ("The Rome Games of 2024", 2 * 2 / (3 + 4)),  # invents rome
        ("It was nice.", 0.0),
    ]
    found = score("factuality", [text for text, _ in pairs], {"reference": [reference] * len(pairs)})
    assert found == pytest.approx([value for _, value in pairs])
    assert score("factuality", ["nothing", "In 3 days"], {"r": ["no fact", "no fact"]}, column="r") == [1.0, 0.0]


# ---------------------------------------------------------------------------------------------------------------- code
@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("x = 1\n", 0.0),
        ("x = 1", 0.0),  # no newline at the end is no fault of a response
        ("x=1\ny = 2", -1 / 2),  # E225
        ("x=1\n\n\ny=2\n", -1.0),
        ("import os, sys;y=1", -1.0),  # several in one line: not less than -1
        ("def f(:", -1.0),
        ("", -1.0),
        (" \n", -1.0),
        ("\0", -1.0),
        ("Here it is:\n```python\nx=1\ny = 2\n```\nDone.", -1 / 2),
        ("  x = 1\n  y = 2\n", 0.0),
        ('x = "\\d"\n', -1.0),  # W605
        ("x = " + "1" * 80 + "\ny = 1\n", -1 / 2),  # E501
    ],
)
def test_pep8(response: str, expected: float) -> None:
    found = score("pep8", [response])
    assert found == pytest.approx([expected])
    assert math.copysign(1.0, found[0]) == (1.0 if expected == 0 else -1.0)


# -------------------------------------------------------------------------------------------------------------- models
def test_semantic_similarity(tiny_bert: MakeModel) -> None:
    path = tiny_bert(BertModel)
    model, tokenizer = BertModel.from_pretrained(path).eval(), tiny_bert.tokenizer  # type: ignore[attr-defined]
    texts = ["one two", "three", "a bb ccc two"]
    references = ["one two", "a bb", "three"]

    def embedding(text: str) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0)

    before = torch.get_rng_state()
    found = score("semantic_similarity", [*texts, " "], {"reference": [*references, "one"]}, model=str(path))
    assert torch.equal(torch.get_rng_state(), before)
    expected = [torch.cosine_similarity(embedding(a), embedding(b), dim=0).item() for a, b in zip(texts, references)]  # noqa: B905
    assert found == pytest.approx([*expected, 0.0], abs=1e-5)
    assert found[0] == pytest.approx(1.0)
    assert found[1] < 0.999
    assert score("semantic_similarity", ["one " * 99], {"reference": ["one " * 98]}, model=str(path)) == pytest.approx(
        [1.0]
    )
    assert "it must be a text; on row 1" in error_of(
        "semantic_similarity", ["a", "b"], {"reference": ["a", None]}, model=str(path)
    )


def test_sentiment(tiny_bert: MakeModel) -> None:
    path = tiny_bert(BertForSequenceClassification, id2label={0: "NEGATIVE", 1: "POSITIVE"}, num_labels=2)
    model, tokenizer = BertForSequenceClassification.from_pretrained(path).eval(), tiny_bert.tokenizer  # type: ignore[attr-defined]
    texts = ["one two", "three a bb"]

    def probability(text: str) -> list[float]:
        with torch.no_grad():
            return model(torch.tensor([tokenizer(text)["input_ids"]])).logits.softmax(-1)[0].tolist()

    for label, index in (("positive", 1), ("NEGATIVE", 0), (1, 1)):
        found = score("sentiment", texts, model=str(path), label=label)
        assert found == pytest.approx([probability(text)[index] for text in texts], abs=1e-6)
    scorer = rewards.make_scorer("sentiment", {"model": str(path), "label": 1, "with_prompt": True})
    assert scorer(["one two "], ["three"], {}) == pytest.approx([probability("one two three")[1]], abs=1e-6)
    message = error_of("sentiment", texts, {}, model=str(path), label="happy")
    assert "has no label 'happy'; it has NEGATIVE (0), POSITIVE (1); on row 0" in message


def test_models_that_do_not_fit(tiny_bert: MakeModel, tmp_path: Path) -> None:
    one = tiny_bert(BertForSequenceClassification, num_labels=1)
    assert "has one output" in error_of("sentiment", ["one"], {}, model=str(one), label=0)
    assert "cannot be loaded" in error_of("sentiment", ["one"], {}, model=str(tmp_path / "gone"), label=0)
    assert "has no weights for classifier.bias" in error_of(
        "sentiment", ["one"], {}, model=str(tiny_bert(BertModel)), label=0
    )
