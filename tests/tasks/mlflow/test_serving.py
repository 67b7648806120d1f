"""Models that are logged load back and predict what transformers predicts."""

import asyncio
import copy
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import mlflow
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from flows.team.server import free_port
from rlhf.models import adapt, loading
from rlhf.rewards import RewardModel
from rlhf.runs.generate import Sampling, respond
from rlhf.runs.policies import Place
from tasks.mlflow.files import log_model
from tasks.mlflow.journal import RunJournal
from tasks.mlflow.server import connect
from tasks.mlflow.sync import ship
from tests.rlhf.conftest import TinyBert

PROMPTS = ["The pool is closed on Monday.", "Hi", "A parcel came: it is at the desk in the hall"]
RESPONSES = [" Closed Monday.", " Hello", " Parcel at the desk."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(PROMPTS + RESPONSES, vocab_size=300, special_tokens=["<|end|>", "<|pad|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.save(str(path))
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|end|>", pad_token="<|pad|>")


def config(tokenizer: PreTrainedTokenizerFast, **more: Any) -> GPT2Config:
    torch.manual_seed(0)
    return GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=2,
        n_positions=96,
        vocab_size=len(tokenizer),
        initializer_range=0.5,  # large, so that the likeliest tokens are clear and differ between prompts
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


@pytest.fixture(scope="module")
def policy(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "model"
    model = GPT2LMHeadModel(config(tokenizer))
    with torch.no_grad():  # let it stop now and then
        model.transformer.wte.weight[tokenizer.eos_token_id] *= 1.5
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_reward_model(tokenizer: PreTrainedTokenizerFast, path: Path) -> Path:
    GPT2ForSequenceClassification(config(tokenizer, num_labels=1, score_mean=0.7, score_std=2.0)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def load(store: str, path: Path, digest: str, kind: str) -> Any:
    """Log the model by way of a run, and load it as anyone would."""
    client = connect(store)
    experiment = client.get_experiment_by_name("models")
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment("models", artifact_location=(path.parent / "mlartifacts").as_uri())
    )
    run = client.create_run(experiment_id)
    model_id = log_model(client, run.info.run_id, kind, path, digest, kind)
    return loaded(store, f"models:/{model_id}")


def loaded(store: str, uri: str) -> Any:
    mlflow.set_tracking_uri(store)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return mlflow.pyfunc.load_model(uri)
    finally:
        mlflow.set_tracking_uri(None)


def greedy(path: Path, prompt: str, new: int) -> str:
    """One prompt, without padding, token by token, cut at the end of sequence."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    model = GPT2LMHeadModel.from_pretrained(path).eval()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    response: list[int] = []
    with torch.inference_mode():
        for _ in range(new):
            so_far = torch.cat([ids, torch.tensor([response], dtype=torch.long)], dim=1)
            token = int(model(so_far, attention_mask=torch.ones_like(so_far)).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            response.append(token)
    return str(tokenizer.decode(response, skip_special_tokens=True))


def test_a_policy_gives_what_transformers_gives(store: str, policy: Path) -> None:
    model = load(store, policy, "policy-digest", "policy")
    expected = [greedy(policy, prompt, 24) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    params = {"max_new_tokens": 24}
    assert model.predict(pd.DataFrame({"prompt": PROMPTS}), params=params) == expected
    assert model.predict(PROMPTS, params=params) == expected
    assert model.predict(pd.DataFrame({"prompt": PROMPTS}), params={**params, "batch_size": 1}) == expected


def test_sampling_obeys_its_seed_and_leaves_the_generator_alone(store: str, policy: Path) -> None:
    model = load(store, policy, "policy-digest", "policy")
    state = torch.get_rng_state()
    params = {"max_new_tokens": 16, "temperature": 5.0}
    first, again, other = (model.predict(PROMPTS, params={**params, "seed": seed}) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("pad", ["<|pad|>", "<|end|>"])
def test_a_reward_model_gives_the_logit_normalised(
    store: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, pad: str
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad
    path = make_reward_model(tokenizer, tmp_path / "model")
    model = load(store, path, f"reward-{pad}", "reward")
    direct = GPT2ForSequenceClassification.from_pretrained(path).eval()
    direct.config.pad_token_id = None  # one row, without padding: it reads the last token
    expected = []
    with torch.inference_mode():
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            ids = tokenizer(prompt + response + "<|end|>", return_tensors="pt")["input_ids"]
            expected.append((direct(ids).logits.item() - 0.7) / 2.0)
    table = pd.DataFrame({"prompt": PROMPTS, "response": RESPONSES})
    assert model.predict(table) == pytest.approx(expected, abs=1e-5)
    texts = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    assert model.predict(texts) == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in expected}) == len(PROMPTS)


def test_an_encoder_reads_what_it_read_in_training(store: str, tmp_path: Path) -> None:
    """Its tokenizer ends a text with [SEP] itself; another end would be a token that it never saw."""
    path = TinyBert(tmp_path)(BertForSequenceClassification, num_labels=1, score_mean=0.3, score_std=0.5)
    prompts, responses = ["one ant", "two", "three bee cat"], [" a bb", " ccc .", " dog"]
    scorer = RewardModel(loading.load_reward_model(path).eval(), loading.load_tokenizer(path))
    expected = scorer(prompts, responses, {})
    served = load(store, path, "encoder-digest", "reward")
    assert served.predict(pd.DataFrame({"prompt": prompts, "response": responses})) == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in expected}) == len(prompts)
    [plain] = served.predict(["one ant"])
    assert served.predict(["one ant[SEP]"]) == pytest.approx([plain], abs=1e-6)


def test_what_it_cannot_answer_is_refused_in_words(
    store: str, policy: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = load(store, policy, "policy-digest", "policy")
    with pytest.raises(ValueError, match="no column 'prompt'"):
        model.predict(pd.DataFrame({"text": PROMPTS, "more": PROMPTS}))
    with pytest.raises(MlflowException, match="temperature"):
        model.predict(PROMPTS, params={"temperature": "hot"})
    with pytest.raises(ValueError, match="takes 96 in all"):
        model.predict(["a " * 90], params={"max_new_tokens": 32})
    reward = load(store, make_reward_model(tokenizer, tmp_path / "model"), "reward-plain", "reward")
    with pytest.raises(ValueError, match="prompt and response"):
        reward.predict(pd.DataFrame({"prompt": PROMPTS, "answer": RESPONSES}))


def test_a_model_is_copied_once_and_attached_to_every_run_that_has_it(
    store: str, policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for name, path in (("a", policy), ("b", tmp_path / "collected as garbage"), ("c", policy)):
        with RunJournal.open(tmp_path / name) as journal:
            journal.start("demo", experiment="shared")
            journal.start_stage("ppo")
            journal.model("ppo", "ppo/model", path, "same-digest", "policy")
        started = time.perf_counter()
        state = ship(tmp_path / name, store)
        print(f"{name}: {time.perf_counter() - started:.2f} s")
        assert (state.complete, state.skipped) == (True, 0), caplog.text
        (tmp_path / name / "shipped.json").unlink()
        assert ship(tmp_path / name, store).complete
    client = MlflowClient(store)
    [model] = client.search_logged_models([state.experiment_id], "tags.`rlhf.digest` = 'same-digest'")
    assert (model.name, model.model_type, model.tags["rlhf.kind"]) == ("ppo-model", "policy", "policy")
    runs = client.search_runs([state.experiment_id], "tags.`rlhf.stage` = 'ppo'")
    assert [[output.model_id for output in run.outputs.model_outputs] for run in runs] == [[model.model_id]] * 3


def test_a_model_half_sent_is_sent_again(
    store: str, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunJournal.open(tmp_path / "half") as journal:
        journal.start("demo", experiment="half")
        journal.model("pipeline", "ppo", policy, "half-digest", "policy")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_model_artifacts", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
        assert not ship(tmp_path / "half", store).complete
    state = ship(tmp_path / "half", store)
    assert state.complete
    [model] = MlflowClient(store).search_logged_models([state.experiment_id])
    assert model.status == "READY"


def test_the_file_imports_nothing_of_this_project() -> None:
    source = (Path(__file__).parents[3] / "tasks" / "mlflow" / "serving.py").read_text()
    assert "import rlhf" not in source
    assert "from rlhf" not in source
    assert "from tasks" not in source


# As a server


def registered(store: str, path: Path, name: str, folder: Path) -> str:
    """Register a model as a run does, and make it the champion; its URI."""
    with RunJournal.open(folder / f"run-{name}") as journal:
        journal.start("demo", experiment="served")
        about = {"name": "ppo-model", "digest": name, "kind": "ppo", "about": "", "note": "", "tags": {}}
        journal.register("pipeline", name, path=path, **about)
    state = ship(folder / f"run-{name}", store)
    assert (state.complete, state.skipped) == (True, 0)
    MlflowClient(store).set_registered_model_alias(name, "champion", "1")
    return f"models:/{name}@champion"


@contextmanager
def serving(store: str, uri: str, folder: Path) -> Iterator[str]:
    """The address of ``mlflow models serve``, without a network."""
    port = free_port()
    command = [*(sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": store, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # it looks for uvicorn
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, (folder / "serve.log").read_text()
            assert time.monotonic() < deadline, (folder / "serve.log").read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def make_policy(kind: str, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """A tiny policy of a kind as the ppo stage leaves it: adapters are merged."""
    torch.manual_seed(0)
    if kind == "t5":
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 1}
        ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
        model: Any = T5ForConditionalGeneration(T5Config(**shape, **ids, initializer_factor=5.0))
    else:
        model = GPT2LMHeadModel(config(tokenizer))
    if kind == "lora":
        model = adapt.add_lora(model, rank=2, alpha=8.0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:  # zero at first, so that nothing would be merged
                    weight.normal_()
        model = adapt.merge_lora(model)
    loading.save(model, tokenizer, path)


def answer(address: str, request: dict[str, Any]) -> Any:
    found = httpx.post(address, json=request, timeout=120)
    assert found.status_code == 200, found.text
    return found.json()["predictions"]


def answer_here(store: str, uri: str, request: dict[str, Any]) -> Any:
    """What the program that ``mlflow models serve`` starts answers, in this process."""
    model = loaded(store, uri)
    from mlflow.pyfunc import scoring_server  # it warns of types of MLflow's own where it comes first

    transport = httpx.ASGITransport(app=scoring_server.init(model))

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://served") as client:
            return await client.post("/invocations", json=request)

    found = asyncio.run(post())
    assert found.status_code == 200, found.text
    return found.json()["predictions"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["causal", "lora", "t5"])
def test_a_served_champion_answers_as_rlhf_generate_does(
    store: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str
) -> None:
    """The causal one by a server as a whole; what differs in the others is the model that it loads."""
    make_policy(kind, tokenizer, tmp_path / "model")
    expected = [answer.text for answer in respond(Place(str(tmp_path / "model")), PROMPTS, Sampling(12))]
    uri = registered(store, tmp_path / "model", f"served-{kind}", tmp_path)
    table = {"columns": ["prompt"], "data": [[prompt] for prompt in PROMPTS]}
    request = {"dataframe_split": table, "params": {"max_new_tokens": 12}}
    if kind == "causal":
        with serving(store, uri, tmp_path) as address:
            assert answer(address, request) == expected
    assert answer_here(store, uri, request) == expected
    assert any(expected)


def test_a_served_reward_model_scores(store: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = make_reward_model(tokenizer, tmp_path / "model")
    scorer = RewardModel(loading.load_reward_model(path).eval(), loading.load_tokenizer(path))
    rows = [list(row) for row in zip(PROMPTS, RESPONSES, strict=True)]
    uri = registered(store, path, "served-reward", tmp_path)
    found = answer_here(store, uri, {"dataframe_split": {"columns": ["prompt", "response"], "data": rows}})
    assert found == pytest.approx(scorer(PROMPTS, RESPONSES, {}), abs=1e-5)
