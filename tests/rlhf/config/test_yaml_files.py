"""Reading configurations: layers, overrides, paths, YAML 1.2, and the text that they are written as."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import yaml_files as settings
from rlhf.config.fields import written
from rlhf.errors import ConfigError

SMALL = "data: {demonstrations: a.jsonl, preferences: b.jsonl}\nmodel: {init: random}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def load(file: Path, text: str, *overrides: str, size: str | None = None) -> Any:
    file.write_text(text, "utf-8")
    return settings.load(file, size=size, overrides=overrides)


def error_of(file: Path, text: str, *overrides: str, size: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, text, *overrides, size=size)
    return str(caught.value)


# --- layers


def test_the_demo_is_the_default() -> None:
    assert settings.load() == settings.load("demo")
    assert settings.load().name == "demo"


def test_layers_in_their_order(file: Path) -> None:
    text = "preset: demo\nppo: {updates: 7, episodes: 16}\nsizes: {smoke: {seed: 5}, large: {ppo: {updates: 900}}}\n"
    plain = load(file, text)
    assert (plain.ppo.updates, plain.ppo.max_new_tokens) == (7, settings.load("demo").ppo.max_new_tokens)
    smoke = load(file, text, size="smoke")  # the size is laid over the file, and the file's size over the preset's
    assert (smoke.ppo.updates, smoke.seed) == (settings.load("demo", size="smoke").ppo.updates, 5)
    assert load(file, text, size="large").ppo.updates == 900
    assert load(file, text, "ppo.updates=8", size="large").ppo.updates == 8
    assert load(file, text, "ppo.updates=8", "ppo.updates=9").ppo.updates == 9


def test_dictionaries_and_lists_are_replaced(file: Path) -> None:
    config = load(file, "preset: demo\nevaluate: {scorers: {short: 'm:f'}}\njudge: {annotators: [x]}\n")
    assert written(config.evaluate.scorers) == {"short": "m:f"}
    assert config.judge.annotators == ("x",)


def test_off_keeps_the_settings_below(file: Path) -> None:
    text = "preset: demo\nsft: off\n"
    config = load(file, text)
    assert not config.sft.enabled
    assert config.sft.epochs == settings.load("demo").sft.epochs
    assert load(file, text, "sft=on") == load(file, "preset: demo\n")
    assert not load(file, text, "sft.epochs=9").sft.enabled


def test_an_empty_section_is_empty(file: Path) -> None:
    assert load(file, SMALL + "sft:\n  # epochs: 3\n").sft.enabled


def test_merge_keys_and_anchors(file: Path) -> None:
    text = SMALL + "sft: &training {epochs: 2, batch_size: 4}\nreward: {<<: *training, epochs: 5}\n"
    config = load(file, text)
    assert (config.reward.epochs, config.reward.batch_size) == (5, 4)


def test_a_preset_wins_over_a_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("name: other\n")
    assert settings.load("demo").name == "demo"


# --- YAML


def test_yaml_1_2(file: Path) -> None:
    text = SMALL + "ppo: {missing_eos: off, learning_rate: 1e-4, updates: 010, whiten_rewards: true}\n"
    config = load(file, text + "name: 2024-01-01\ntracking: {experiment: on}\n")
    assert config.ppo.missing_eos == "off"
    assert (config.ppo.learning_rate, config.ppo.updates, config.ppo.whiten_rewards) == (1e-4, 10, True)
    assert (config.name, config.tracking.experiment) == ("2024-01-01", "on")


def test_byte_order_mark(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert settings.load(file).model.init == "random"


def test_places_name_the_layer(file: Path) -> None:
    message = error_of(
        file, "preset: demo\nseed: -1\nsizes:\n  big:\n    ppo:\n      epochs: 0\n", "sft.epochs=0", size="big"
    )
    assert message.startswith("3 errors")
    assert f"{file}:2: seed" in message
    assert f"{file}:6: ppo.epochs" in message
    assert "--set sft.epochs: is 0" in message


def test_sizes(file: Path) -> None:
    assert "no size 'smok' (its sizes: smoke); did you mean 'smoke'?" in error_of(file, "preset: demo\n", size="smok")
    assert "it has none" in error_of(file, SMALL, size="smoke")
    assert f"{file}:3: sizes must be" in error_of(file, SMALL + "sizes: 3\n")


def test_presets_of_files(file: Path) -> None:
    message = error_of(file, "preset: dmeo\n")
    assert f"{file}:1: there is no preset 'dmeo' (presets: custom-flan-t5, " in message
    assert "did you mean 'demo'?" in message
    assert f"{file}:1: preset is 3; must be text" in error_of(file, "preset: 3\n")


def test_preset_name_near_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(SMALL)
    with pytest.raises(ConfigError, match=r"did you mean the file mine\.yaml"):
        settings.load("mine")


# --- overrides


def test_override_values(file: Path) -> None:
    config = load(
        file,
        SMALL,
        "ppo.learning_rate=1e-5",
        "data.prompts=[/a.jsonl, /b.jsonl]",
        "data.prompt_template={post} TL;DR: #1",
        "model.revision=1234567",
        "sft.max_steps=5",
        "sft.max_steps=",
        'tracking.experiment="a\\tb"',
        "ppo.missing_eos=off",
    )
    assert config.ppo.learning_rate == 1e-5
    assert config.data.prompts == ("/a.jsonl", "/b.jsonl")
    assert config.data.prompt_template == "{post} TL;DR: #1"
    assert (config.model.revision, config.sft.max_steps, config.tracking.experiment) == ("1234567", None, "a\tb")
    assert config.ppo.missing_eos == "off"


def test_override_of_an_entry_with_dots(file: Path) -> None:
    config = load(file, SMALL, "ppo.rewards.rlhf.rewards:brevity=0.5", "ppo.rewards.model=2")
    assert written(config.ppo.rewards) == {"model": 2.0, "rlhf.rewards:brevity": 0.5}
    assert written(load(file, SMALL, "ppo.rewards.a:b=0.5").ppo.rewards) == {"model": 1.0, "a:b": 0.5}
    config = load(file, SMALL, "ppo.rewards.a.b:c=0.5", "ppo.rewards.model=", "reward=off", "judge=off")
    assert written(config.ppo.rewards) == {"a.b:c": 0.5}
    config = load(file, SMALL, "evaluate.scorers.gold=rlhf.demo:gold_score")
    assert written(config.evaluate.scorers) == {"gold": "rlhf.demo:gold_score"}
    assert "--set ppo.rewards.a:b: is 'x'" in error_of(file, SMALL, "ppo.rewards.a:b=x")


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["brevity=0.5"], {"model": 1.0, "brevity": 0.5}),
        (
            ["keywords.arguments.words=[yes, no]", "keywords.weight=2"],
            {"model": 1.0, "keywords": {"arguments": {"words": ["yes", "no"]}, "weight": 2.0}},
        ),
        (["model.weight=0.5"], {"model": 0.5}),
        (["model=3", "model.function=politeness"], {"model": {"function": "politeness", "weight": 3.0}}),
        (["a.b:c.arguments.x.y=1", "a.b:c.arguments.z=2"], {"a.b:c": {"arguments": {"x.y": 1, "z": 2}, "weight": 1.0}}),
        (["a.b:c.arguments={x: 1, z: 2}", "a.b:c.arguments.z="], {"a.b:c": {"arguments": {"x": 1}, "weight": 1.0}}),
        (["my.function.mod:f=2", "brevity={weight: 3}"], {"my.function.mod:f": 2.0, "brevity": 3.0}),
    ],
)
def test_override_of_a_part_of_a_reward(file: Path, overrides: list[str], found: dict[str, Any]) -> None:
    config = load(file, SMALL, *(f"ppo.rewards.{text}" for text in overrides))
    assert written(config.ppo.rewards) == {"model": 1.0} | found


def test_override_of_a_scorers_arguments(file: Path) -> None:
    text = SMALL + "evaluate: {scorers: {k: keywords}}\n"
    config = load(file, text, "evaluate.scorers.k.arguments.words=[a]", "evaluate.scorers.brevity={}")
    assert written(config.evaluate.scorers) == {
        "k": {"function": "keywords", "arguments": {"words": ["a"]}},
        "brevity": "brevity",
    }


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("brevty: 1", "config.yaml:3: ppo.rewards.brevty: function 'brevty' is no built-in reward (brevity, exact_"),
        (
            "brevty: 1",
            "), and a function of your own is `module:function` or `path/file.py:function`; did you mean 'brevity'?",
        ),
        ("x: {function: brevty}", "ppo.rewards.x: function 'brevty' is no built-in reward"),
        (
            "brevity: [1]",
            "config.yaml:3: ppo.rewards.brevity: is [1]; must be a plain weight or a section with the keys",
        ),
        ("brevity: true", "ppo.rewards.brevity: is True; must be a plain weight"),
        ("brevity: .inf", "ppo.rewards.brevity.weight: is inf; must be finite"),
        ("brevity: {wieght: 1}", "config.yaml:3: ppo.rewards.brevity.wieght: unknown key; did you mean 'weight'?"),
        ("brevity: {arguments: {a: 1}}", "arguments.a: brevity takes no such argument; it takes none"),
        (
            "keywords: {arguments: {word: [a]}}",
            "arguments.word: keywords takes no such argument; it takes words, regex; did you mean 'words'?",
        ),
        ("keywords: 1", "ppo.rewards.keywords: arguments.words is missing; keywords needs it"),
        ("keywords: {arguments: {words: a}}", "arguments.words is 'a'; it should be a valid list"),
        ("keywords: {arguments: {words: []}}", "arguments.words is empty and there is no regex"),
        ("keywords: {arguments: {words: [a], regex: '('}}", "arguments.regex is '('; it is no regular expression"),
        (
            "similarity: {arguments: {metric: rouge3}}",
            "arguments.metric is 'rouge3'; it should be 'rouge1', 'rouge2' or",
        ),
        ("model: {arguments: {a: 1}}", "ppo.rewards.model: arguments: the trained reward model takes none"),
    ],
)
def test_bad_rewards(file: Path, rewards: str, message: str) -> None:
    assert message in error_of(file, SMALL + f"ppo: {{rewards: {{{rewards}}}}}\n")


def test_the_reward_model_is_no_scorer(file: Path) -> None:
    assert "scores every text anyway" in error_of(file, SMALL, "evaluate.scorers.x=model")


def test_overrides_merge_sections(file: Path) -> None:
    config = load(file, SMALL, "sft={epochs: 2}", "sft.batch_size=8")
    assert (config.sft.epochs, config.sft.batch_size) == (2, 8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("ppo.=3", "expected KEY=VALUE"),
        ("pp.updates=3", "did you mean 'ppo'?"),
        ("ppo.update=3", "did you mean 'updates'?"),
        ("updates=3", "did you mean 'ppo.updates'?"),
        ("ppo.seed=3", "did you mean 'seed'?"),
        ("ppo.updates.x=3", "--set ppo.updates.x: ppo.updates: is {'x': 3}; must be a whole number"),
        ("ppo.updates={a", "not valid YAML"),
        ("data.prompt_template=", "data.prompt_template: is nothing (null); must be text"),
    ],
)
def test_bad_overrides(file: Path, override: str, message: str) -> None:
    assert message in error_of(file, SMALL, override)


# --- paths


def test_paths_start_at_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (folder / "my-model").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    text = (
        "data:\n  demonstrations: [a.jsonl, 'more/*.csv', demo:x.parquet, /abs.json]\n  preferences: ~/b.jsonl\n"
        "model: {path: my-model}\nreward: {path: org/name}\n"
        "ppo: {rewards: {'r.py:f': 1, 'pkg.mod:g': 2, model: 1}}\nevaluate: {scorers: {s: 'sub/s.py:h', t: 'm:f'}}\n"
    )
    config = load(folder / "config.yaml", text, "data.prompts=c.jsonl")
    assert config.data.demonstrations == (f"{folder}/a.jsonl", f"{folder}/more/*.csv", "demo:x.parquet", "/abs.json")
    assert config.data.preferences == (str(Path("~/b.jsonl").expanduser()),)
    assert config.data.prompts == (f"{elsewhere}/c.jsonl",)
    assert (config.model.path, config.reward.path) == (f"{folder}/my-model", "org/name")
    assert set(config.ppo.rewards) == {f"{folder}/r.py:f", "pkg.mod:g", "model"}
    assert written(config.evaluate.scorers) == {"s": f"{folder}/sub/s.py:h", "t": "m:f"}
    monkeypatch.chdir(folder)
    assert settings.load("config.yaml", overrides=[f"data.prompts={elsewhere}/c.jsonl"]) == config


@pytest.mark.parametrize("path", ["./gone", "../gone", "/gone", "~/gone"])
def test_model_paths_that_are_clearly_paths(file: Path, path: str) -> None:
    config = load(file, SMALL.replace("{init: random}", f"{{path: {path}}}"))
    assert Path(config.model.path).is_absolute()


# --- writing


def test_functions_in_entries_and_arguments_start_at_the_files_folder(tmp_path: Path) -> None:
    for name in ("data/words.txt", "data/positive/x", "positive/x", "encoder/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    text = (
        SMALL + "ppo:\n  rewards:\n    mine: {function: 'r.py:f', arguments: {files: [data/words.txt, gone.txt],\n"
        "      folder: ./data/positive, label: positive, model: encoder, n: 1}}\n    r.py:f: 2\n"
        "evaluate: {scorers: {s: {function: 'sub/s.py:h'}, t: {function: sentiment, arguments: {model: org/name,\n"
        "  label: positive}}}}\n"
    )
    config = load(tmp_path / "config.yaml", text)
    mine = config.ppo.rewards["mine"]
    assert mine.function == f"{tmp_path}/r.py:f"
    assert mine.arguments == {
        "files": [f"{tmp_path}/data/words.txt", "gone.txt"],
        "folder": f"{tmp_path}/data/positive",
        "label": "positive",  # a folder has this name, too
        "model": f"{tmp_path}/encoder",
        "n": 1,
    }
    assert config.ppo.rewards[f"{tmp_path}/r.py:f"].weight == 2
    assert config.evaluate.scorers["s"].function == f"{tmp_path}/sub/s.py:h"
    assert config.evaluate.scorers["t"].arguments["model"] == "org/name"
    assert load(tmp_path / "sub.yaml", settings.dump(config)) == config


def test_an_error_in_a_file_function_has_its_line(file: Path) -> None:
    text = SMALL + "ppo:\n  rewards:\n    model: 1\n    r.py:f: {wieght: 1}\n"
    assert f"{file}:6: ppo.rewards." in error_of(file, text)


def test_dump_reads_back(file: Path, tmp_path: Path) -> None:
    config = load(
        file,
        SMALL,
        "data.prompt_template='{a: b}\\n# off'",
        "ppo.missing_eos_value=-1e30",
        "ppo.learning_rate=1e-7",
        "model.revision='1e5'",
        "tracking.experiment='on: off'",
        "name=n0",
        "evaluate.scorers.x=a:b",
        "evaluate.scorers.k={function: keywords, arguments: {words: ['no', '1'], regex: '[a: b]'}}",
        "ppo.rewards.polite={function: politeness, weight: -2}",
        "ppo.rewards.exact_word_count={}",
    )
    for one in (config, settings.load("demo"), settings.load("demo", size="smoke")):
        text = settings.dump(one)
        assert load(tmp_path / "dumped.yaml", text) == one
    assert "# Weight beta of the per-token KL penalty, in reward per nat.\n  kl_coef: 0.05" in settings.dump(config)


# --- speed


def test_it_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "pyarrow", "numpy", "datasets", "prefect", "mlflow"}
    code = f"import sys; from rlhf.config import load; load(); print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_custom_flan_t5_lets_through_its_judge_and_reward_model_can_read() -> None:
    """Of 512 tokens, RoBERTa's ends and an eighth more tokens than T5's included."""
    config = settings.load("custom-flan-t5")
    responses = (config.data.max_response_tokens, config.ppo.max_new_tokens, config.evaluate.max_new_tokens)
    assert config.data.max_prompt_tokens is not None
    assert 9 / 8 * (config.data.max_prompt_tokens + max(size or 0 for size in responses)) + 2 <= 512
