"""``rlhf generate``: which policies it finds, what it asks them, and what it says where something is missing."""

from __future__ import annotations

import functools
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.cache.plan import Planner
from rlhf.config.pipeline import PipelineConfig
from rlhf.config.yaml_files import load
from rlhf.models import loading
from rlhf.prepare.random_weights import random_model
from rlhf.prepare.tokens import train_tokenizer
from rlhf.runs.generate import Sampling, respond, scorers
from rlhf.runs.policies import MODELS, Place
from rlhf.runs.records import RunRecord
from rlhf.store.artifacts import Store, make_manifest
from tasks.mlflow.journal import RunJournal
from tasks.mlflow.server import default_uri
from tasks.mlflow.sync import ship

Rlhf = Callable[..., tuple[int, str, str]]
WORDS = ["ant bee cat", "dog eel fox"]
REWARDS = """
def brevity(prompts, responses):
    return [-float(len(response)) for response in responses]

def wants_fact(prompts, responses, fact):
    return [float(len(f)) for f in fact]
"""
YAML = """
name: tiny
data: {demonstrations: d.jsonl, preferences: d.jsonl, prompt_template: "Q: {prompt} A:"}
model: {init: random, layers: 1, width: 16, heads: 2, context: 48, vocab_size: 270}
ppo: {max_new_tokens: 8, rewards: {"model": 1.0, "rewards.py:brevity": 1.0}}
evaluate: {max_new_tokens: 8, scorers: {fact: "rewards.py:wants_fact"}}
resources: {device: cpu, threads: 1}
"""


@pytest.fixture
def rlhf(offline_rlhf: Rlhf) -> Rlhf:
    """The command ``rlhf generate`` in this process."""
    return functools.partial(offline_rlhf, "generate")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineConfig:
    """A pipeline's configuration, ``tiny.yaml``, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text('{"prompt": "a", "response": "b", "chosen": "b", "rejected": "c"}\n')
    Path("rewards.py").write_text(REWARDS)
    Path("tiny.yaml").write_text(YAML)
    return load("tiny.yaml")


@pytest.fixture
def done(config: PipelineConfig, tmp_path: Path) -> dict[str, str]:
    """Untrained models in the place of what a run of the pipeline would leave; the key of each stage."""
    return publish(config, Store(tmp_path / "home"))


def publish(config: PipelineConfig, store: Store) -> dict[str, str]:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(WORDS, 270, 48)
    known: dict[str, Any] = {}
    for stage in ("prepare", "sft", "judge", "reward", "ppo"):
        plan = Planner(config, store).decide(stage, known)
        out = store.work_directory(stage, str(plan.key)) / "out"
        out.mkdir(parents=True)
        if stage in MODELS:
            policy = out / MODELS[stage]
            loading.save(random_model(config.model, tokenizer), tokenizer, policy)
            if stage == "reward":
                loading.save(loading.reward_from_policy(policy), tokenizer, policy)
        for part in ("demonstrations", "preferences", "prompts"):
            (out / part).write_text(stage)
        known[stage] = make_manifest(
            out, stage=stage, key=plan.key, ingredients=dict(plan.ingredients), pipeline=config.name
        )
        store.publish(out, known[stage])
    record = RunRecord("20260101-run", config.name, "done", 1.0, config=config.model_dump(mode="json"))
    record.stages = {name: {"key": manifest.key} for name, manifest in known.items()}
    record.write(store.home)
    return {name: manifest.key for name, manifest in known.items()}


def test_all_policies_of_a_pipeline_answer_the_prompts_as_they_are(rlhf: Rlhf, done: Any, tmp_path: Path) -> None:
    code, out, error = rlhf("tiny.yaml", "--prompt", "ant bee", "--prompt", " dog\n", "--json")
    assert (code, error) == (0, "")
    found = json.loads(out)
    store = tmp_path / "home/store"
    assert found["policies"] == {
        "base": f"{store}/prepare/{done['prepare']}/base",
        "sft": f"{store}/sft/{done['sft']}/model",
        "ppo": f"{store}/ppo/{done['ppo']}/model",
    }
    assert [sample["prompt"] for sample in found["samples"]] == ["ant bee", " dog\n"]
    assert found["sampling"] == {"max_new_tokens": 8, "temperature": 0.0, "seed": 0}
    assert found["notes"] == [f"score fact: left out, as the prompts have no fact ({tmp_path}/rewards.py:wants_fact)"]
    for name, path in found["policies"].items():
        model, tokenizer = loading.load_policy(path), loading.load_tokenizer(path)
        for sample in found["samples"]:
            ids = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
            greedy = {"max_new_tokens": 8, "do_sample": False}
            new = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0, ids.shape[1] :]
            response = sample["responses"][name]
            assert response["text"] == tokenizer.decode(new, skip_special_tokens=True)
            assert (response["tokens"], response["ended"]) == (len(new), bool(new[-1] == tokenizer.eos_token_id))
            assert response["scores"].keys() == {"reward", "brevity"}
            assert response["scores"]["brevity"] == -len(response["text"])


def test_functions_of_one_name_in_two_files_are_both_there(config: PipelineConfig) -> None:
    Path("other.py").write_text(REWARDS)
    two = load("tiny.yaml", overrides=["ppo.rewards.other.py:brevity=1"])
    found, _ = scorers(two, None, {})
    here = str(Path.cwd()).replace("/", ".").lstrip(".")
    assert set(found) == {f"{here}.rewards.py.brevity", f"{here}.other.py.brevity"}


def test_a_run_and_directories_and_a_terminal(rlhf: Rlhf, done: Any, tmp_path: Path) -> None:
    by_run = json.loads(rlhf("--run", "20260101-run", "--prompt", "ant", "--json")[1])
    assert by_run["policies"].keys() == {"base", "sft", "ppo"}
    directories = [by_run["policies"][name] for name in ("sft", "ppo")]
    code, out, _ = rlhf(*directories, "--prompt", "ant", "--max-new-tokens", "8", "--json")
    found = json.loads(out)
    assert (code, list(found["policies"]), found["notes"]) == (0, directories, [])
    for name, directory in zip(("sft", "ppo"), directories, strict=True):
        [sample], [same] = by_run["samples"], found["samples"]
        assert sample["responses"][name]["text"] == same["responses"][directory]["text"]
    code, out, error = rlhf("tiny.yaml", "--prompt", "[bold]ant\x1b[2J")
    assert "\x1b" not in out
    assert code == 0
    for part in ("prompt 1 of 1", "[bold]ant", "base", "sft", "ppo", "reward", "brevity"):
        assert part in out
    assert error == f"score fact: left out, as the prompts have no fact ({tmp_path}/rewards.py:wants_fact)\n"


def test_prompts_of_files_and_of_standard_input(
    rlhf: Rlhf, done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prompts(*arguments: str) -> list[str]:
        code, out, _ = rlhf("tiny.yaml", "--json", *arguments)
        assert code == 0
        return [sample["prompt"] for sample in json.loads(out)["samples"]]

    Path("p.txt").write_text("ant \n\n dog\n")
    assert prompts("--file", "p.txt") == ["ant ", " dog"]
    assert prompts("--file", "p.txt", "--template") == ["Q: ant  A:", "Q:  dog A:"]
    monkeypatch.setattr("sys.stdin", io.StringIO("bee\ncat\n"))
    assert prompts() == ["bee", "cat"]
    Path("p.jsonl").write_text('{"prompt": "two\\nlines", "fact": "abc"}\n')
    code, out, _ = rlhf("tiny.yaml", "--json", "--file", "p.jsonl")
    found = json.loads(out)
    assert (code, found["notes"]) == (0, [])
    assert found["samples"][0]["prompt"] == "two\nlines"
    assert found["samples"][0]["responses"]["ppo"]["scores"]["fact"] == 3.0


def test_sampling_is_of_the_seed_and_of_nothing_else(done: Any, tmp_path: Path) -> None:
    place = Place(str(tmp_path / "home/store/sft" / done["sft"] / "model"))
    first = respond(place, WORDS, Sampling(8, 1.0, 1))
    assert respond(place, WORDS, Sampling(8, 1.0, 1)) == first
    assert respond(place, WORDS[:1], Sampling(8, 1.0, 1)) == first[:1]
    assert respond(place, WORDS, Sampling(8, 1.0, 2)) != first


def test_what_is_missing_and_what_is_old_is_said(rlhf: Rlhf, done: Any, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "home/store/ppo")
    code, out, _ = rlhf("tiny.yaml", "--prompt", "ant", "--json", "--set", "sft.learning_rate=0.5")
    found = json.loads(out)
    assert (code, list(found["policies"])) == (0, ["base", "sft"])
    old, new, missing = found["notes"][:3]
    assert old.startswith("sft: not up to date (config.sft.learning_rate: 0.0001 -> 0.5)")
    assert new.startswith("reward: not up to date (input sft: will be made anew")
    assert missing.startswith("ppo: missing (")
    assert "`rlhf run --until ppo` makes it" in missing
    _, out, _ = rlhf("--run", "20260101-run", "--prompt", "ant", "--json")
    assert json.loads(out)["notes"][0] == "ppo: missing (artifact missing)"


def test_a_registered_model_answers(rlhf: Rlhf, done: Any, tmp_path: Path) -> None:
    home, place = tmp_path / "home", tmp_path / "home/store/ppo" / done["ppo"] / "model"
    digest = Store(home).open("ppo", done["ppo"]).parts["model"]
    with RunJournal.open(home / "runs" / "20260101-run") as journal:
        journal.start("tiny", experiment="rlhf")
        journal.register(
            "pipeline", "tiny", name="ppo-model", path=place, digest=digest, kind="ppo", about="", note="",
            tags={"rlhf.stage": "ppo", "rlhf.key": done["ppo"]},
        )  # fmt: skip
    assert ship(home / "runs" / "20260101-run", default_uri(home)).complete
    names = ["models:/tiny@candidate", "models:/tiny/1", str(place)]
    code, out, error = rlhf(*names, "--prompt", "ant", "--max-new-tokens", "8", "--json")
    assert code == 0, error
    found = json.loads(out)
    assert found["policies"] == dict.fromkeys(names, str(place))
    assert len({response["text"] for response in found["samples"][0]["responses"].values()}) == 1
    code, out, error = rlhf("models:/tiny@champion", "--prompt", "ant")
    assert (code, out) == (2, "")
    assert "'tiny' has no alias 'champion'; it has: @candidate" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models:/tiny@champion", "--prompt", "a"], "there is no MLflow store"),
        (["models:/tiny@champion", "tiny.yaml", "--prompt", "a"], "name models, or one preset or file"),
        (["tiny.yaml", "--prompt", "a"], "has no policy yet: prepare: missing (never run)"),
        (["--run", "no-such", "--prompt", "a"], "there is no run 'no-such'"),
        (["--run", "x", "tiny.yaml", "--prompt", "a"], "--run says all"),
        (["tiny.yaml", "demo", "--prompt", "a"], "name one preset or file"),
        (["dmeo", "--prompt", "a"], "did you mean 'demo'"),
    ],
)
def test_what_cannot_be_found_ends_with_2(
    rlhf: Rlhf, config: PipelineConfig, arguments: list[str], message: str
) -> None:
    code, out, error = rlhf(*arguments)
    assert (code, out) == (2, "")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "none.txt"], "--file none.txt cannot be read"),
        (["--file", "bad.jsonl"], "bad.jsonl, line 2 is not JSON"),
        (["--file", "text.jsonl"], "is not an object with a text"),
        (["--file", "empty.txt"], "there is no prompt"),
        (["--prompt", ""], "prompt 1, '', has no token"),
        (["--prompt", "ant", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--prompt", "ant", "--max-new-tokens", "48"], "more than the context of 48 tokens"),
    ],
)
def test_bad_prompts_end_with_2(rlhf: Rlhf, done: Any, arguments: list[str], message: str) -> None:
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    Path("text.jsonl").write_text('"just a text"\n')
    Path("empty.txt").write_text("\n")
    code, out, error = rlhf("tiny.yaml", *arguments)
    assert (code, out) == (2, "")
    assert message in error
