"""The layers of the code: what import-linter holds, and that it would not hold anything else."""

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rlhf import handed_out
from rlhf.cache.fingerprint import WITHOUT_NUMBERS

ROOT = Path(__file__).parents[1]


def lint(folder: Path) -> tuple[int, str]:
    """The exit code of import-linter in a folder, and what it printed."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code, to break."""
    folder = tmp_path_factory.mktemp("code")
    for package in ("rlhf", "tasks", "flows"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_the_layers_hold(copy: Path) -> None:
    code, said = lint(copy)
    assert code == 0, said


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("rlhf/store/disk.py", "import rlhf.config.pipeline", "The layers of rlhf"),
        ("rlhf/store/disk.py", "def f():\n    from rlhf.runs.records import read_runs", "The layers of rlhf"),
        ("rlhf/models/adapt.py", "if TYPE_CHECKING:\n    from rlhf.config.model import Model", "The layers of rlhf"),
        ("rlhf/sft/stage.py", "from rlhf.reward import rows", "The layers of rlhf"),
        ("rlhf/config/fields.py", "from rlhf.config.pipeline import PipelineConfig", "No circles"),
        ("rlhf/anything.py", "", "The layers of rlhf"),  # a seventh file at the top has no layer
        ("rlhf/store/disk.py", "import numpy", "What is in no cache key computes nothing"),
        ("rlhf/config/explain.py", "from rlhf.metrics import text", "What is in no cache key computes nothing"),
        ("rlhf/tracking/mean.py", "def f():\n    import torch", "What is in no cache key computes nothing"),
        ("rlhf/cache/plan.py", "import mlflow", "The library knows neither Prefect nor MLflow"),
        ("rlhf/cache/plan.py", "import tasks.run", "flows -> tasks -> rlhf"),
        ("tasks/processes/system.py", "import tasks.run", "The layers of tasks"),
        ("flows/pipeline.py", "from flows.commands import summary", "The layers of flows"),
        ("rlhf/ppo/core.py", "import pyarrow", "The PPO engine needs only"),
    ],
)
def test_a_module_that_imports_upward_is_refused(copy: Path, file: str, line: str, contract: str) -> None:
    path = copy / file
    before = path.read_text() if path.exists() else None
    path.write_text(f"from typing import TYPE_CHECKING\n{line}\n" if before is None else f"{before}\n{line}\n")
    try:
        code, said = lint(copy)
    finally:
        path.unlink() if before is None else path.write_text(before)
    broken = [line for line in said.splitlines() if "BROKEN" in line]
    assert code == 1, said
    assert any(line.startswith(contract) for line in broken), said


def test_what_is_in_no_cache_key_is_what_computes_nothing() -> None:
    """A module that shapes numbers cannot lie where no key sees it: the folders are those of the contract."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    [contract] = [one for one in settings["contracts"] if one["name"] == "What is in no cache key computes nothing"]
    folders = {f"rlhf.{name}" for name in WITHOUT_NUMBERS if name != "."}
    at_the_top = {f"rlhf.{path.stem}" for path in (ROOT / "rlhf").glob("*.py")} - {"rlhf.__init__"}
    called_by_name = {"rlhf.demo", "rlhf.published"}  # their code is in the key of who names them, as any function's
    assert set(contract["source_modules"]) == folders | at_the_top - called_by_name


def test_what_a_package_hands_out_has_not_the_name_of_one_of_its_modules() -> None:
    """Whoever imports such a module first, from anywhere, would make it what the package hands out."""
    for package in (ROOT / "rlhf").rglob("__init__.py"):
        files = [*package.parent.glob("*.py"), *package.parent.glob("*/__init__.py")]
        modules = {path.parent.name if path.stem == "__init__" else path.stem for path in files}
        assert handed_out(ast.parse(package.read_bytes())).keys() & modules == set(), package
