"""Where things lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf import locations
from rlhf.errors import DataError
from rlhf.locations import data_path, demo_data_directory, home_directory, matching_files


def test_demo_data_of_an_installed_package_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "__file__", str(tmp_path / "rlhf" / "locations.py"))
    assert demo_data_directory() == tmp_path / "data"
    (tmp_path / "rlhf" / "demo_data").mkdir(parents=True)
    assert demo_data_directory() == tmp_path / "rlhf" / "demo_data"
    assert data_path("demo:x.parquet") == tmp_path / "rlhf" / "demo_data" / "x.parquet"


def test_home_is_given_or_in_the_environment_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home_directory(str(tmp_path / "given")) == tmp_path / "given"
    assert home_directory() == tmp_path / "home"  # RLHF_HOME, set for every test
    monkeypatch.delenv("RLHF_HOME")
    monkeypatch.chdir(tmp_path)
    assert home_directory() == tmp_path / ".rlhf"


def test_a_pattern_names_many_files_and_a_name_with_brackets_one(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "c[1].csv"):
        (tmp_path / name).touch()
    assert [path.name for path in matching_files(f"{tmp_path}/?.csv", "data.prompts")] == ["a.csv", "b.csv"]
    assert [path.name for path in matching_files(f"{tmp_path}/c[1].csv", "data.prompts")] == ["c[1].csv"]


@pytest.mark.parametrize(("name", "message"), [("*.json", "no file matches"), ("a.csw", "did you mean 'a.csv'")])
def test_nothing_found_names_the_setting(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=r"data\.prompts: .*" + message):
        matching_files(f"{tmp_path}/{name}", "data.prompts")
