"""Each bad input ends in one clear message, and in nothing written."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from rlhf.config import yaml_files as settings
from rlhf.context import Context
from rlhf.errors import InputError
from rlhf.prepare.stage import run
from rlhf.tracking.tracker import NullTracker
from tests.rlhf.bad_input_cases import CASES
from tests.rlhf.projects import Case, good


def prepare(source: Path | str, overrides: list[str], folder: Path) -> Path:
    """Read the configuration, run the first stage, and return the folder that it writes to."""
    out = folder / "out"
    out.mkdir()
    config = settings.load(source, overrides=overrides)
    run(Context("prepare", config, {}, out, folder / "checkpoints", NullTracker()))
    return out


def test_the_good_project_is_good(tmp_path: Path) -> None:
    out = prepare(good(tmp_path), [], tmp_path)
    assert (out / "report.json").is_file()


def test_there_are_many_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 45


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input(case: Case, tmp_path: Path) -> None:
    source, overrides = case.make(tmp_path)
    with pytest.raises(InputError) as caught:
        prepare(source, overrides, tmp_path)
    message = str(caught.value)
    assert [fragment for fragment in case.fragments if fragment not in message] == [], message
    assert "Traceback" not in message
    assert "pydantic" not in message
    assert not message.endswith((" ", "\n", ":"))
    assert list((tmp_path / "out").iterdir()) == []
    assert str(pickle.loads(pickle.dumps(caught.value))) == message
