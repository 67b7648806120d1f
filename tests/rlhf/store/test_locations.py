"""Where things lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.errors import ConfigError, DataError
from rlhf.store import locations
from rlhf.store.locations import (
    data_path,
    demo_data_directory,
    expanded,
    home_directory,
    matching_files,
    named_by_argument,
)


def test_demo_data_of_an_installed_package_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "__file__", str(tmp_path / "rlhf" / "store" / "locations.py"))
    assert demo_data_directory() == tmp_path / "data"
    (tmp_path / "rlhf" / "demo_data").mkdir(parents=True)
    assert demo_data_directory() == tmp_path / "rlhf" / "demo_data"
    assert data_path("demo:x.parquet", "data.prompts") == tmp_path / "rlhf" / "demo_data" / "x.parquet"


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


def test_a_malformed_pattern_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.prompts: the pattern '.*\*\*\.jsonl' is malformed: .*; write data/\*"
    ):
        matching_files(f"{tmp_path}/**.jsonl", "data.prompts")


def test_the_home_of_an_unknown_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path names the setting; an argument is then a text, such as ``~50`` for "about 50"."""
    with pytest.raises(ConfigError, match=r"data\.prompts: '~50/a\.csv' begins with '~50', .* write \./~50/a\.csv"):
        matching_files("~50/a.csv", "data.prompts")
    with pytest.raises(ConfigError, match=r"--home \(RLHF_HOME\): '~50' begins"):
        home_directory("~50")
    assert named_by_argument("~50", tmp_path) is None
    monkeypatch.chdir(tmp_path)
    Path("~50").touch()
    assert matching_files("./~50", "data.prompts") == [expanded("./~50", "x")] == [Path("~50")]
    assert expanded("~", "x") == Path.home()
