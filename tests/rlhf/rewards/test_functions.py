"""Rewards: what a function may return, what its errors say, and what the reward model reads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf import rewards
from rlhf.config.fields import RewardSpec
from rlhf.errors import ConfigError, RewardError
from rlhf.prepare.random_weights import random_model
from rlhf.rewards.registry import labels

PROMPTS, RESPONSES = ["p one", "p two", "p three"], [" a", " bb", " ccc"]


def lengths(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
    return [len(response) for response in responses]


def call(function: Any, columns: dict[str, list[Any]] | None = None) -> list[float]:
    return rewards.call_reward(function, "mine", PROMPTS, RESPONSES, columns or {})


# ------------------------------------------------------------------------------------------------------- functions
def test_functions_are_loaded_from_modules_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rewards.load_function("math:fsum")([1.0]) == 1.0
    (tmp_path / "my_rewards.py").write_text("def seven(prompts, responses):\n    return [7] * len(responses)\n")
    assert rewards.load_function(f"{tmp_path}/my_rewards.py:seven")(["p"], ["r"]) == [7]
    monkeypatch.chdir(tmp_path)
    assert rewards.load_function("my_rewards.py:seven")(["p"], ["r"]) == [7]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("math", r"'math' does not name a function; write `module:function`"),
        (":f", "does not name a function"),
        ("math:", "does not name a function"),
        ("math:pi", r"math has no function 'pi'"),
        ("os.path:exist", r"has no function 'exist'; it has .*abspath"),
        ("no_such_module:f", r"no_such_module cannot be imported: ModuleNotFoundError"),
        ("no/such/file.py:f", r"there is no file .*no/such/file\.py"),
        ("broken.py:f", r"cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_cannot_be_loaded(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=message):
        rewards.load_function(name)


DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

loaded = []


@dataclass
class Weights:
    one: float = 1.0


def first(prompts, responses):
    loaded.append(1)
    return [Weights().one] * len(responses)


def second(prompts, responses):
    return [float(len(loaded))] * len(responses)
"""


def test_a_file_is_a_module_that_runs_once_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "my.py"
    path.write_text(DATACLASS)
    assert rewards.load_function(f"{path}:first")(["p"], ["r"]) == [1.0]
    assert rewards.load_function(f"{path}:second")(["p"], ["r"]) == [1.0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "my.py").write_text(DATACLASS)
    assert rewards.load_function(f"{tmp_path}/other/my.py:second")(["p"], ["r"]) == [0.0]
    path.write_text(DATACLASS.replace("= 1.0", "= 2.0"))  # as long, and in the same second
    assert rewards.load_function(f"{path}:first")(["p"], ["r"]) == [2.0]
    path.write_text("1 / 0")
    modules = set(sys.modules)
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        rewards.load_function(f"{path}:first")
    assert len(modules - set(sys.modules)) == 1
    path.write_text(DATACLASS)
    assert rewards.load_function(f"{path}:first")(["p"], ["r"]) == [1.0]


def test_rewards_in_python_are_called_by_their_names() -> None:
    short = partial(lengths, unit=1)
    assert set(rewards.Rewards.of(short, max).parts) == {"lengths", "max"}
    with pytest.raises(ConfigError, match="2 rewards are called 'lengths'"):
        rewards.Rewards.of(short, lengths)
    with pytest.raises(ConfigError, match=r"2 rewards are called '<lambda>'.*set their __name__"):
        rewards.Rewards.of(lambda prompts, responses: [], lambda prompts, responses: [])


def test_labels_that_would_be_the_same() -> None:
    assert labels(["a.py:f", "b/c:f", "g:h"]) == {"a.py:f": "a.py.f", "b/c:f": "b.c.f", "g:h": "h"}
    with pytest.raises(ConfigError, match=r"two rewards would be called 'a\.b\.f'"):
        labels(["a/b:f", "a.b:f"])


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_a_function_may_return_any_sequence_of_numbers(kind: Any) -> None:
    assert call(lambda prompts, responses: kind([1, 2.5, -3])) == [1.0, 2.5, -3.0]


def test_a_function_gets_the_columns_that_it_takes() -> None:
    columns = {"target": [1, 2, 3], "other": [4, 5, 6]}
    seen: list[dict[str, Any]] = []

    def every(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        seen.append(columns)
        return [0.0] * 3

    def one(prompts: list[str], responses: list[str], target: list[int]) -> list[float]:
        return [float(value) for value in target]

    def none(prompts: list[str], responses: list[str]) -> list[float]:
        return [0.0] * 3

    call(every, columns)
    assert seen == [columns]
    assert call(one, columns) == [1.0, 2.0, 3.0]
    assert call(none, columns) == [0.0] * 3
    with pytest.raises(RewardError, match=r"'mine' raised TypeError.*target"):
        call(one, {})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], "'mine' returned 2 numbers for 3 responses"),
        (3.0, "'mine' returned float; it must return a list of 3 numbers"),
        ([1.0, float("nan"), 2.0], "'mine' returned nan, for row 1: prompt 'p two', response ' bb'"),
        ([1.0, 2.0, float("inf")], "returned inf, for row 2"),
        ([1.0, None, 2.0], "returned None, which is not a number, for row 1"),
        (["x", 1.0, 2.0], "returned 'x', which is not a number, for row 0"),
    ],
)
def test_a_bad_result_is_refused(result: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        call(lambda prompts, responses: result)


def test_an_exception_names_function_and_row() -> None:
    def picky(prompts: Sequence[str], responses: Sequence[str], n: Sequence[int]) -> list[float]:
        return [10 / value for value in n]

    with pytest.raises(RewardError, match=r"'mine' raised ZeroDivisionError.*on row 2: prompt 'p three'") as caught:
        call(picky, {"n": [1, 2, 0]})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def together(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        if len(responses) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(RewardError, match="too many; on the batch"):
        call(together)


def test_arguments_hide_columns_and_reach_every_row() -> None:
    def scaled(prompts: Sequence[str], responses: Sequence[str], n: list[int], scale: Any, offset: float = 0.0) -> Any:
        return [value * scale + offset for value in n]

    scorer = rewards.FunctionScorer(scaled, "mine", {"scale": 2, "offset": 1})
    assert scorer(PROMPTS, RESPONSES, {"n": [1, 2, 3], "scale": [7, 7, 7]}) == [3.0, 5.0, 7.0]
    with pytest.raises(RewardError, match=r"'mine' raised TypeError: .*; on row 1"):
        scorer(PROMPTS, RESPONSES, {"n": [1, None, 3]})


def test_arguments_that_a_function_does_not_take(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "def f(prompts, responses, scale=1.0): ...\ndef g(prompts, responses, **more): ...\ndef h(p, r): ...\n"
    )
    assert rewards.make_scorer(f"{tmp_path}/r.py:f", {"scale": 2}).arguments == {"scale": 2}
    assert rewards.make_scorer(f"{tmp_path}/r.py:g", {"any": 2}).arguments == {"any": 2}
    with pytest.raises(ConfigError, match=r"r.py:f' takes no argument 'scal'; it takes scale; did you mean 'scale'\?"):
        rewards.make_scorer(f"{tmp_path}/r.py:f", {"scal": 2})
    with pytest.raises(ConfigError, match=r"takes no argument 'p'; it takes none beside the texts"):
        rewards.make_scorer(f"{tmp_path}/r.py:h", {"p": 2})
    with pytest.raises(ConfigError, match=r"arguments.scale: brevity takes no such argument; it takes none"):
        rewards.make_scorer("brevity", {"scale": 2})


# ---------------------------------------------------------------------------------------------------- reward model
def make_tokenizer(pad: str) -> PreTrainedTokenizerFast:
    words = ["<e>", "<p>", "p", "one", "two", "three", "a", "bb", "ccc"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<p>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", pad_token=pad)


def make_reward_model(architecture: str) -> Any:
    torch.manual_seed(0)
    shape: Any = SimpleNamespace(architecture=architecture, layers=2, width=16, heads=2, context=12)
    config = random_model(shape, make_tokenizer("<p>")).config
    config.num_labels, config.score_mean, config.score_std = 1, 0.5, 2.0
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    return model


@pytest.mark.parametrize("pad", ["<p>", "<e>"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_reward_model_reads_the_last_real_token(architecture: str, pad: str) -> None:
    """Against each text alone, without padding: prompt, response, end-of-sequence, in the model's own tokens."""
    model, tokenizer = make_reward_model(architecture), make_tokenizer(pad)
    prompts, responses = ["p one", "p", "p two three one"], [" a bb", " ccc", ""]
    for tokens_at_once in (16384, 1):
        scorer = rewards.RewardModel(model, tokenizer, tokens_at_once)
        found = scorer(prompts, responses, {})
        for prompt, response, score in zip(prompts, responses, found, strict=True):
            ids = torch.tensor([[*tokenizer(prompt + response)["input_ids"], tokenizer.eos_token_id]])
            with torch.no_grad():
                logit = model.score(model.base_model(ids).last_hidden_state[0, -1])
            assert score == pytest.approx((logit.item() - 0.5) / 2.0, rel=1e-4, abs=1e-5)
    assert len({round(score, 4) for score in found}) == 3


def test_an_end_of_sequence_that_is_there_is_not_doubled() -> None:
    scorer = rewards.RewardModel(make_reward_model("gpt2"), make_tokenizer("<p>"))
    assert scorer(["p one"], [" a<e>"], {}) == scorer(["p one"], [" a"], {})


def test_an_encoder_can_be_a_reward_model() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=9, num_labels=1, pad_token_id=1, **shape)).eval()
    scorer = rewards.RewardModel(model, make_tokenizer("<p>"))
    found = scorer(PROMPTS, RESPONSES, {})
    assert found == pytest.approx([scorer([p], [r], {})[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)], rel=1e-4)


def test_a_text_longer_than_the_reward_models_context_is_refused() -> None:
    scorer = rewards.RewardModel(make_reward_model("gpt2"), make_tokenizer("<p>"))
    with pytest.raises(RewardError, match=r"reads at most 12 tokens, but prompt and response have 13 in row 1"):
        scorer(["p", "p one"], [" a", " a" * 10], {})


# ---------------------------------------------------------------------------------------------------- weighted sum
def test_the_weighted_sum_and_its_parts(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f(prompts, responses):\n    return [1.0] * len(responses)\n")
    (tmp_path / "b.py").write_text("def f(prompts, responses):\n    return [2.0] * len(responses)\n")
    model = rewards.RewardModel(make_reward_model("gpt2"), make_tokenizer("<p>"))
    weights = {"model": 0.5, f"{tmp_path}/a.py:f": 3.0, f"{tmp_path}/b.py:f": -1.0, "math:fsum": 1.0}
    made = rewards.make_rewards({k: v for k, v in weights.items() if k != "math:fsum"}, model)
    scores, parts = made(PROMPTS, RESPONSES, {})
    assert [name[-6:].strip("/") for name in parts] == ["model", "a.py.f", "b.py.f"]
    torch.testing.assert_close(scores, 0.5 * parts["model"] + 3.0 - 2.0)
    assert parts["model"].tolist() == pytest.approx(model(PROMPTS, RESPONSES, {}))
    assert set(rewards.make_rewards({"math:fsum": 1.0}, None).parts) == {"fsum"}
    with pytest.raises(ConfigError, match="there is no reward model"):
        rewards.make_rewards({"model": 1.0}, None)


def test_rewards_are_named_by_their_entry() -> None:
    model = rewards.RewardModel(make_reward_model("gpt2"), make_tokenizer("<p>"))
    specs = {
        "quality": RewardSpec(weight=2.0, function="model"),
        "short": RewardSpec(weight=0.5, function="brevity"),
        "keywords": RewardSpec(weight=-1.0, function="keywords", arguments={"words": ["a"]}),
    }
    scores, parts = rewards.make_rewards(specs, model)(PROMPTS, RESPONSES, {})
    assert parts["short"].tolist() == [-1.0, -1.0, -1.0]
    assert parts["keywords"].tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(scores, 2 * parts["quality"] - 0.5 - parts["keywords"])
