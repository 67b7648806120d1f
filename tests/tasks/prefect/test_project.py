"""The folder of one's own that a worker's runs work in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from rlhf.cache.fingerprint import function_file
from rlhf.errors import ConfigError
from tasks.prefect.project import PROJECT, enter_project


@pytest.fixture(autouse=True)
def by_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process has that a worker has started: an empty folder, and the flow run's id."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "1")


def test_relative_paths_and_functions_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROJECT, str(tmp_path))
    (tmp_path / "of_ones_own.py").write_text("def f(): ...\n")
    enter_project()
    enter_project()  # a pipeline of a sweep does so again
    assert Path.cwd() == tmp_path
    assert (sys.path[-1], sys.path.count(str(tmp_path))) == (str(tmp_path), 1)  # last, so that it hides nothing
    assert function_file("of_ones_own:f") == tmp_path / "of_ones_own.py"
    assert function_file("of_ones_own.py:f").samefile(tmp_path / "of_ones_own.py")


@pytest.mark.parametrize("missing", [PROJECT, "PREFECT__FLOW_RUN_ID"])
def test_elsewhere_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setenv(PROJECT, str(tmp_path))
    monkeypatch.delenv(missing)
    before = os.getcwd(), [*sys.path]
    enter_project()
    assert (os.getcwd(), sys.path) == before


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("/no/such/folder", "RLHF_PROJECT=/no/such/folder: No such file or directory; make this folder"),
        (__file__, "Not a directory"),
        ("project", "RLHF_PROJECT=project: must be an absolute path"),
    ],
)
def test_a_folder_that_cannot_be_entered(monkeypatch: pytest.MonkeyPatch, folder: str, says: str) -> None:
    monkeypatch.setenv(PROJECT, folder)
    with pytest.raises(ConfigError, match=says):
        enter_project()
