"""The real pipeline at smoke size, as a user runs it: whole processes, killed, doubled, damaged, with its code edited.

The first run is shared; each test works on a copy of its home folder. That run is a fresh interpreter; what comes after
it is forked (``tests.quick_python``). The tables of Prefect and MLflow are there, as the servers make them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.yaml_files import load
from rlhf.stages import STAGES
from rlhf.store import locked
from rlhf.tracking.tracker import read_journal
from tests import quick_python

ROOT = Path(__file__).parents[2]
LONGER = {"ppo.updates": 8, "ppo.checkpoint_every": 2}  # enough steps that a kill falls between two checkpoints
CONFIG = [word for name, value in LONGER.items() for word in ("--set", f"{name}={value}")]
RUN = ("run", "demo", "--size", "smoke", *CONFIG)
HEAVY = ("torch", "prefect", "mlflow", "transformers", "trl", "pyarrow", "datasets", "pandas")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def environment(home: Path, code: Path = ROOT) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return kept | {"RLHF_HOME": str(home), "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}


def start(home: Path, *arguments: str, code: Path = ROOT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [quick_python.executable(), "-m", "flows.commands.cli", *arguments],
        env=environment(home, code),
        cwd=home.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interpreter(home: Path, *words: str) -> str:
    """What a fresh interpreter prints that is started with these words."""
    done = subprocess.run(
        [sys.executable, *words], env=environment(home), cwd=home.parent, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rlhf(home: Path, *arguments: str, code: Path = ROOT) -> str:
    process = start(home, *arguments, code=code)
    out, error = process.communicate()
    assert process.returncode == 0, out + error
    return out


def run(home: Path, *arguments: str, code: Path = ROOT) -> str:
    return rlhf(home, *RUN, *arguments, code=code)


def plan(home: Path, *arguments: str, code: Path = ROOT) -> dict[str, dict[str, Any]]:
    out = rlhf(home, "plan", "demo", "--size", "smoke", *CONFIG, "--json", *arguments, code=code)
    return {row["stage"]: row for row in json.loads(out)}


def to_run(rows: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name, row in rows.items() if row["action"] == "run"]


def digests(home: Path) -> dict[str, str]:
    manifests = [json.loads(path.read_text()) for path in (home / "store").glob("*/*/manifest.json")]
    return {manifest["stage"]: manifest["digest"] for manifest in manifests}


@pytest.fixture(scope="session")
def finished(common: Path, prefect_tables: Path, mlflow_tables: Path) -> Path:
    """The home folder of a pipeline that has run once, undisturbed: one for all processes that run tests."""
    folder, home = common / "finished", common / "finished" / "home"
    with locked(folder / "lock"):
        if not (folder / "done").exists():
            (home / "prefect").mkdir(parents=True)
            shutil.copy(prefect_tables, home / "prefect" / "prefect.db")
            shutil.copy(mlflow_tables, home / "mlflow.db")
            assert "all stages are up to date" in interpreter(home, "-m", "flows.commands.cli", *RUN)
            (folder / "done").touch()
    return home


@pytest.fixture
def home(finished: Path, mlflow_tables: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, without its runs."""
    home = tmp_path / "copy"
    shutil.copytree(finished, home, ignore=shutil.ignore_patterns("runs", "mlflow.db", "mlartifacts"))
    shutil.copy(mlflow_tables, home / "mlflow.db")
    yield home
    shutil.rmtree(home)


def test_every_stage_left_what_it_promises(finished: Path) -> None:
    assert list(digests(finished)) != []
    assert set(digests(finished)) == set(STAGES)
    [report] = (finished / "runs").glob("*/report.html")
    assert "<html" in report.read_text()
    for pickled in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle"):
        assert list((finished / "store").rglob(pickled)) == []


def test_an_up_to_date_run_imports_nothing_heavy(home: Path) -> None:
    code = (
        "import sys; from flows.commands.cli import main; code = main(sys.argv[1:]); "
        f"print('heavy:', [name for name in {HEAVY} if name in sys.modules], 'code:', code)"
    )
    out = interpreter(home, "-c", code, *RUN)
    assert "all stages are up to date" in out
    assert out.splitlines()[-1] == "heavy: [] code: 0"


def test_an_override_runs_ppo_and_evaluate_and_mlflow_has_all(finished: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    home = tmp_path / "home"
    shutil.copytree(finished, home)
    rows = plan(home, "--set", "ppo.kl_coef=0.1")
    assert to_run(rows) == ["ppo", "evaluate"]
    [reason] = rows["ppo"]["reasons"]
    assert reason == f"config.ppo.kl_coef: {load().ppo.kl_coef} -> 0.1"
    run(home, "--set", "ppo.kl_coef=0.1")
    records = [json.loads(path.read_text()) for path in sorted((home / "runs").glob("*/run.json"))]
    assert {name for name, row in records[-1]["stages"].items() if not row["cached"]} == {"ppo", "evaluate"}

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("rlhf")
    assert experiment is not None
    parents = client.search_runs(
        [experiment.experiment_id], "tags.`rlhf.kind` = 'pipeline'", order_by=["attributes.start_time ASC"]
    )
    first, second = parents
    assert first.info.status == second.info.status == "FINISHED"
    assert set(first.data.metrics) == set(second.data.metrics)
    for stage in ("sft", "reward"):  # from the cache: the very curves, with their times
        for name in (name for name in first.data.metrics if name.startswith(f"{stage}/")):
            once, again = (client.get_metric_history(parent.info.run_id, name) for parent in (first, second))
            assert [(p.step, p.value) for p in once] == [(p.step, p.value) for p in again], name
    curve = client.get_metric_history(second.info.run_id, "ppo/kl")
    assert [point.step for point in curve] == list(range(1, LONGER["ppo.updates"] + 1))
    children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{second.info.run_id}'")
    assert {child.data.tags["rlhf.stage"]: child.data.tags["rlhf.cache"] for child in children} == {
        "prepare": "hit", "sft": "hit", "judge": "hit", "reward": "hit", "ppo": "miss", "evaluate": "miss",
    }  # fmt: skip


def test_a_killed_stage_resumes_to_the_same_bits(finished: Path, home: Path) -> None:
    """Here PPO; tests/faults kills at any moment of any stage, and each training's own tests resume at any step."""
    stage = "ppo"
    arguments = (*RUN, "--only", stage)
    key = plan(home)[stage]["key"]
    work = home / "work" / f"{stage}-{key}"
    process = start(home, *arguments)
    deadline = time.monotonic() + 240
    while len(list(work.glob("checkpoints/checkpoint-*/manifest.json"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert work.exists()  # it was not done yet
    killed = time.time() * 1000
    rlhf(home, *arguments)
    assert digests(home)[stage] == digests(finished)[stage]
    points = list(read_journal(home / "store" / stage / key / "metrics.jsonl"))
    assert points[0].t < killed < points[-1].t  # it went on, and did not begin again
    undisturbed = list(read_journal(finished / "store" / stage / key / "metrics.jsonl"))
    assert [point.step for point in points] == [point.step for point in undisturbed]
    timeless = [{k: v for k, v in p.values.items() if "second" not in k and "memory" not in k} for p in points]
    assert timeless == [{k: p.values[k] for k in kept} for p, kept in zip(undisturbed, timeless, strict=True)]


def stages_of(home: Path) -> list[dict[str, bool]]:
    """For each run, the stages that finished, and whether they came from the cache."""
    records = [json.loads(path.read_text()) for path in sorted((home / "runs").glob("*/run.json"))]
    return [{name: row["cached"] for name, row in record["stages"].items()} for record in records]


def test_of_two_runs_the_one_left_finishes(finished: Path, home: Path) -> None:
    for stage in ("ppo", "evaluate"):
        shutil.rmtree(home / "store" / stage)
    first = start(home, *RUN)
    while not list(home.glob("work/ppo-*")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.002)
    first.send_signal(signal.SIGTSTP)  # it is in the stage, and holds its lock
    second = start(home, *RUN)
    while len(stages_of(home)) < 2 or "reward" not in stages_of(home)[1]:
        assert second.poll() is None, second.communicate()
        time.sleep(0.05)
    time.sleep(1.0)
    assert second.poll() is None  # it waits
    first.kill()
    first.communicate()
    out, error = second.communicate()
    assert second.returncode == 0, out + error
    assert digests(home) == digests(finished)


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[str, str], Path]:
    """A copy of the code in which one text of ``rlhf/ppo/core.py`` is replaced."""

    def edit(old: str, new: str) -> Path:
        code = tmp_path / "code"
        if not code.exists():
            for package in ("flows", "tasks", "rlhf", "data"):
                shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
        core = code / "rlhf" / "ppo" / "core.py"
        original = (ROOT / "rlhf" / "ppo" / "core.py").read_text()
        assert original.count(old) == 1
        core.write_text(original.replace(old, new))
        return code

    return edit


def test_editing_the_ppo_core_runs_ppo_and_nothing_before_it(home: Path, edited: Callable[[str, str], Path]) -> None:
    comment = edited(
        "import torch\nfrom torch import Tensor\n", "import torch  # a comment\nfrom torch import Tensor\n"
    )
    assert to_run(plan(home, code=comment)) == []
    function = edited(
        "error = min(max(kl / target - 1.0, -0.2), 0.2)", "error = min(max(kl / target - 1.0, -0.3), 0.2)"
    )
    rows = plan(home, code=function)
    assert to_run(rows)[0] == "ppo"
    assert "code rlhf/ppo/core.py changed" in rows["ppo"]["reasons"]
    run(home, code=function)
    assert {name for name, cached in stages_of(home)[-1].items() if not cached} <= {"ppo", "evaluate"}
