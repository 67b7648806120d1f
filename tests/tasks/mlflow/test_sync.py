"""Shipping a journal to MLflow: once and only once, whatever is killed meanwhile."""

import contextlib
import json
import math
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tasks.mlflow.journal import PARENT, RunJournal
from tasks.mlflow.sync import BusyError, Replay, Shipped, pending_one_by_one, run_urls, ship
from tests.tasks.mlflow_reads import history, runs_of

ROOT = Path(__file__).parents[3]


def begin(directory: Path, experiment: str = "rlhf", **more: Any) -> RunJournal:
    journal = RunJournal.open(directory)
    journal.start("demo", experiment=experiment, params={"seed": 1, "ppo.kl_coef": 0.05}, **more)
    return journal


def write_run(directory: Path, points: int = 20, experiment: str = "rlhf") -> None:
    """A finished run with one stage, three curves and a final figure."""
    with begin(directory, experiment) as journal:
        journal.start_stage("sft", tags={"rlhf.cache": "miss"})
        for step in range(points):
            journal.metrics("sft", {"sft/loss": 1 / (step + 1), "sft/lr": 0.1, "sft/grad_norm": 1.0}, step)
        journal.finals("sft", {"sft/final_loss": 0.5})


# What arrives


def test_parent_and_child_arrive_with_all_that_is_known_of_them(store: str, tmp_path: Path) -> None:
    directory = tmp_path / "r1"
    with begin(directory, note="# A run", columns=["metrics.sft/final_loss", "params.seed"]) as journal:
        journal.text(PARENT, "config.yaml", "seed: 1\n")
        journal.start_stage("sft", tags={"rlhf.cache": "miss", "rlhf.key": "abc"})
        for step in range(5):
            journal.metrics("sft", {"sft/loss": float(step)}, step, t=1_700_000_000_000 + step)
        journal.finals("sft", {"sft/final_loss": 0.5})
        journal.params("sft", {"sft.epochs": 3})
        journal.dataset("sft", "demonstrations", "ab" * 32, "data/demonstrations.parquet", rows=10)
    state = ship(directory, store)
    assert (state.complete, state.skipped) == (True, 0)

    runs = runs_of(store, "r1")
    parent, child = runs[PARENT], runs["sft"]
    assert (parent.info.run_name, child.info.run_name) == ("demo", "demo/sft")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert parent.data.params == {"seed": "1", "ppo.kl_coef": "0.05"}
    assert child.data.params == {"sft.epochs": "3"}
    assert parent.data.tags["mlflow.note.content"] == "# A run"
    assert (child.data.tags["rlhf.cache"], child.data.tags["rlhf.key"]) == ("miss", "abc")
    curve = [(step, float(step)) for step in range(5)]
    for run in (parent, child):
        assert history(store, run, "sft/loss") == curve
        assert history(store, run, "sft/final_loss") == [(0, 0.5)]
    points = MlflowClient(store).get_metric_history(child.info.run_id, "sft/loss")
    assert sorted(point.timestamp for point in points) == [1_700_000_000_000 + step for step in range(5)]
    [data] = child.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("demonstrations", ("ab" * 32)[:36])
    file = MlflowClient(store).download_artifacts(parent.info.run_id, "config.yaml", str(tmp_path))
    assert Path(file).read_text() == "seed: 1\n"
    experiment = MlflowClient(store).get_experiment(parent.info.experiment_id)
    view = json.loads(experiment.tags["mlflow.sharedViewState.rlhf"])
    assert "metrics.`sft/final_loss`" in json.loads(view["state"])["selectedColumns"]
    assert experiment.artifact_location == (Path(store.removeprefix("sqlite:///")).parent / "mlartifacts/rlhf").as_uri()


def test_shipping_again_from_the_start_changes_nothing(store: str, tmp_path: Path) -> None:
    directory = tmp_path / "again"
    write_run(directory, points=700)  # 2100 points in requests of up to 1000: the last of one step may be in the next
    assert ship(directory, store).complete
    first = runs_of(store, "again")
    (directory / "shipped.json").unlink()
    assert ship(directory, store).complete
    assert ship(directory, store).complete
    second = runs_of(store, "again")
    for stage in (PARENT, "sft"):
        assert second[stage].info.run_id == first[stage].info.run_id
        for name, first_value in (("sft/loss", 1.0), ("sft/lr", 0.1), ("sft/grad_norm", 1.0)):
            curve = history(store, second[stage], name)
            assert [step for step, _ in curve] == list(range(700))
            assert curve[0][1] == first_value


def test_values_that_are_no_numbers_do_not_stop_it(store: str, tmp_path: Path) -> None:
    directory = tmp_path / "nan"
    with begin(directory) as journal:
        journal.start_stage("sft")
        for step, value in enumerate([math.nan, math.inf, -math.inf, 1.0]):
            journal.metrics("sft", {"sft/loss": value}, step)
    assert ship(directory, store).skipped == 0
    (directory / "shipped.json").unlink()
    ship(directory, store)
    (_, a), (_, b), (_, c), (_, d) = history(store, runs_of(store, "nan")["sft"], "sft/loss")
    assert math.isnan(a)
    assert b > 1e300
    assert c < -1e300
    assert d == 1.0


def test_a_name_that_mlflow_refuses_is_made_fit(store: str, tmp_path: Path) -> None:
    directory = tmp_path / "names"
    with begin(directory) as journal:
        journal.start_stage("sft")
        journal.metrics("sft", {"sft/größe (%)": 1.0, "sft/" + "x" * 300: 2.0, "/sft//a/../b": 3.0}, 1)
    assert ship(directory, store).skipped == 0
    metrics = runs_of(store, "names")["sft"].data.metrics
    assert sorted(metrics) == sorted(["sft/größe ___", ("sft/" + "x" * 300)[:250], "sft/b"])


def test_what_the_server_will_never_take_is_skipped_and_the_rest_arrives(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "refused"
    with begin(directory) as journal:
        journal.params(PARENT, {"seed": 2})  # it is 1: parameters cannot change
        journal.artifact(PARENT, tmp_path / "missing.png")
        journal.tags(PARENT, {"after": "yes"})
    state = ship(directory, store)
    assert (state.complete, state.skipped) == (True, 2)
    parent = runs_of(store, "refused")[PARENT]
    assert parent.data.params["seed"] == "1"
    assert parent.data.tags["after"] == "yes"
    assert "missing.png" in caplog.text


def test_a_table_arrives_once_in_the_form_the_ui_shows(store: str, tmp_path: Path) -> None:
    directory, parquet = tmp_path / "table", tmp_path / "samples.parquet"
    table = pd.DataFrame({"prompt": ["a", "b"], "score": [0.5, math.nan]})
    table.to_parquet(parquet)
    with begin(directory) as journal:
        journal.table(PARENT, parquet, "samples")
    ship(directory, store)
    (directory / "shipped.json").unlink()
    ship(directory, store)
    parent = runs_of(store, "table")[PARENT]
    assert json.loads(parent.data.tags["mlflow.loggedArtifacts"]) == [{"path": "samples/samples.json", "type": "table"}]
    client = MlflowClient(store)
    file = client.download_artifacts(parent.info.run_id, "samples/samples.json", str(tmp_path))
    pd.testing.assert_frame_equal(pd.read_json(file, orient="split"), table, check_dtype=False)
    names = {file.path for file in client.list_artifacts(parent.info.run_id, "samples")}
    assert names == {"samples/samples.json", "samples/samples.parquet"}


def test_a_cached_stage_links_to_the_run_that_computed_it(store: str, tmp_path: Path) -> None:
    write_run(tmp_path / "first")
    ship(tmp_path / "first", store)
    with begin(tmp_path / "second") as journal:
        journal.start_stage("sft", computed_by="first", note="Same key.")
    ship(tmp_path / "second", store)
    note = runs_of(store, "second")["sft"].data.tags["mlflow.note.content"]
    assert f"/runs/{runs_of(store, 'first')['sft'].info.run_id})" in note
    assert note.endswith("Same key.")


def test_a_cached_stage_links_to_a_run_that_still_goes_on(store: str, tmp_path: Path) -> None:
    first, second = tmp_path / "goes-on", tmp_path / "takes"
    with begin(first) as other, begin(second) as journal, Replay(second, store) as replay:
        for stage in ("sft", "ppo"):
            other.start_stage(stage)
            ship(first, store)
            journal.start_stage(stage, computed_by="goes-on")
            replay.run()
    theirs, ours = runs_of(store, "goes-on"), runs_of(store, "takes")
    for stage in ("sft", "ppo"):
        assert f"/runs/{theirs[stage].info.run_id})" in ours[stage].data.tags["mlflow.note.content"]


def test_a_password_is_not_written_to_a_file_or_link(tmp_path: Path) -> None:
    write_run(tmp_path / "secret")
    uri = "http://me:pass@127.0.0.1:9"
    with Replay(tmp_path / "secret", uri):
        pass
    Shipped(uri=uri, experiment_id="1", runs={PARENT: "abc"}).write(tmp_path / "secret")
    assert run_urls(tmp_path / "secret", uri) == {PARENT: "http://127.0.0.1:9/#/experiments/1/runs/abc"}
    with Replay(tmp_path / "secret", uri):
        pass
    assert "pass" not in (tmp_path / "secret" / "shipped.json").read_text()


class FailingClient:
    """A client that carries out each request, and then loses the answer of some."""

    def __init__(self, uri: str, lose: Callable[[str], bool]) -> None:
        self._client = MlflowClient(uri)
        self._lose = lose
        self.lost = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            result = method(*arguments, **keywords)
            if self._lose(name):
                self.lost += 1
                raise MlflowException("the answer was lost")
            return result

        return call


def test_a_finished_run_takes_few_requests(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One from the cache waits for them."""
    stages = ("sft", "reward", "ppo")
    with begin(tmp_path / "few") as journal:
        for stage in stages:
            journal.start_stage(stage, computed_by="earlier")
            journal.tags(stage, {"a": "1", "b": "2", "c": "3"})
            for step in range(10):
                journal.metrics(stage, {f"{stage}/loss": 0.5}, step)
            journal.finals(stage, {f"{stage}/final": 0.5})
            journal.end(stage)
    calls: Counter[str] = Counter()
    client = FailingClient(store, lambda name: bool(calls.update([name])))
    monkeypatch.setattr("tasks.mlflow.sync.connect", lambda uri: client)
    assert ship(tmp_path / "few", store).complete
    assert (calls["create_run"], calls["set_terminated"], calls["set_tag"]) == (4, 4, 0)
    assert (
        calls["log_batch"] == 1 + 2 * len(stages) + 1
    )  # parameters; tags and curves of each stage; the parent's curves
    assert calls["search_runs"] == 2 + len(stages)  # first and last for its own; nobody has made an earlier one


# What goes wrong


def test_answers_that_are_lost_give_every_run_and_point_once(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "lossy"
    write_run(directory, points=600)
    calls: Counter[str] = Counter()

    def lose(name: str) -> bool:
        calls[name] += 1
        return calls[name] <= 2 and not name.startswith(("get", "search"))

    client = FailingClient(store, lose)
    monkeypatch.setattr("tasks.mlflow.sync.connect", lambda uri: client)
    for _ in range(20):
        with contextlib.suppress(MlflowException):
            ship(directory, store)
            break
    assert Shipped.read(directory).complete
    assert client.lost == 6  # of making, filling and ending runs, two each
    for run in runs_of(store, "lossy").values():
        assert len(history(store, run, "sft/loss")) == 600
        assert run.info.status == "FINISHED"


def test_a_run_made_twice_by_a_late_answer_is_deleted(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "late"
    write_run(directory)
    write_run(tmp_path / "earlier")
    ship(tmp_path / "earlier", store)
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("rlhf")
    assert experiment is not None
    client.create_run(experiment.experiment_id, tags={"rlhf.run_id": "late", "rlhf.stage": "sft"})
    # The run that the first request made is not there yet when it is looked for.
    monkeypatch.setattr(Replay, "_find_runs", lambda self, run_id, stage: [])
    ship(directory, store)
    assert set(runs_of(store, "late")) == {PARENT, "sft"}
    assert history(store, runs_of(store, "late")["sft"], "sft/final_loss") == [(0, 0.5)]


def test_a_file_that_cannot_be_sent_now_does_not_hold_up_the_rest(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "store-down"
    with begin(directory) as journal:
        journal.text(PARENT, "a.txt", "a")
        journal.tags(PARENT, {"after": "yes"})
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", lambda *a: (_ for _ in ()).throw(MlflowException("no bucket")))
        state = ship(directory, store)
    assert not state.complete
    assert len(state.waiting) == 1
    assert "no bucket" in caplog.text
    assert runs_of(store, "store-down")[PARENT].info.status == "FINISHED"
    assert ship(directory, store).complete


def test_runs_that_the_server_has_lost_are_shipped_again(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "lost"
    with begin(directory) as journal:
        journal.start_stage("sft")
        journal.metrics("sft", {"sft/loss": 1.0}, 1)
        state = ship(directory, store)
        state.runs = dict.fromkeys(state.runs, "0" * 32)  # as if the database had been made anew since
        state.write(directory)
    assert ship(directory, store).complete
    assert "has lost the run" in caplog.text
    assert history(store, runs_of(store, "lost")["sft"], "sft/loss") == [(1, 1.0)]


def test_two_at_once_do_not_ship_the_same_journal(store: str, tmp_path: Path) -> None:
    directory = tmp_path / "busy"
    write_run(directory)
    with Replay(directory, store) as replay:
        with pytest.raises(BusyError):
            ship(directory, store)
        assert list(pending_one_by_one(tmp_path, store)) == []
        assert replay.run().complete
    errors: list[BaseException] = []

    def work() -> None:
        try:
            ship(directory, store)
        except BusyError:
            pass
        except BaseException as error:
            errors.append(error)

    (directory / "shipped.json").unlink()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(history(store, runs_of(store, "busy")["sft"], "sft/loss")) == 20


def test_pending_journals_are_shipped_later_and_the_dead_are_ended(store: str, tmp_path: Path) -> None:
    write_run(tmp_path / "p1")
    begin(tmp_path / "p2").close()  # its owner died
    (tmp_path / "p3").mkdir()
    RunJournal.open(tmp_path / "p3").close()  # it died before it began
    living = begin(tmp_path / "p4")
    elsewhere = tmp_path / "p5"
    write_run(elsewhere)
    Shipped(uri="http://elsewhere").write(elsewhere)
    assert list(pending_one_by_one(tmp_path, store)) == [True, True]
    assert list(pending_one_by_one(tmp_path, store)) == []
    assert runs_of(store, "p1")["sft"].info.status == "FINISHED"
    assert runs_of(store, "p2")[PARENT].info.status == "KILLED"
    assert runs_of(store, "p4") == {} == runs_of(store, "p5")
    living.close()
