"""The command line: what it prints, what it refuses, and how."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from flows.team.server import free_port

Rlhf = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rlhf(offline_rlhf: Rlhf) -> Rlhf:
    """The command line in this process."""
    return offline_rlhf


def test_presets_are_listed(rlhf: Rlhf) -> None:
    code, out, _ = rlhf("presets", "--json")
    assert code == 0
    demo = next(preset for preset in json.loads(out) if preset["name"] == "demo")
    assert "smoke" in demo["sizes"]


def test_show_prints_a_configuration_that_loads(rlhf: Rlhf, tmp_path: Path) -> None:
    _, out, _ = rlhf("show", "demo", "--set", "ppo.kl_coef=0.25")
    assert yaml.safe_load(out)["ppo"]["kl_coef"] == 0.25
    (tmp_path / "mine.yaml").write_text(out)
    _, again, _ = rlhf("show", str(tmp_path / "mine.yaml"))
    assert again == out


def test_validate(rlhf: Rlhf) -> None:
    code, out, _ = rlhf("validate", "demo")
    assert code == 0
    assert "demo: valid" in out


def test_runs_and_cache_of_an_empty_home(rlhf: Rlhf) -> None:
    assert rlhf("runs") == (0, "No run yet: rlhf run\n", "")
    assert rlhf("runs", "--json") == (0, "[]\n", "")
    code, out, _ = rlhf("cache", "gc")
    assert (code, out) == (0, "0 deleted, freed 0 B\n")


def test_a_plan_of_an_empty_home_says_never_run(rlhf: Rlhf, tmp_path: Path) -> None:
    code, out, _ = rlhf("plan", "--json")
    assert code == 0
    assert {tuple(row["reasons"]) for row in json.loads(out)} == {("never run",)}
    assert not (tmp_path / "home" / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "dmeo"], "did you mean 'demo'"),
        (["run", "--size", "smok"], "smoke"),
        (["plan", "--set", "ppo.kl_cof=1"], "did you mean 'kl_coef'"),
        (["plan", "--set", "evaluate.scorers.gold=no_module:f"], "no module 'no_module'"),
        (["validate", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_input_ends_with_2_and_one_message(rlhf: Rlhf, arguments: list[str], message: str) -> None:
    code, out, error = rlhf(*arguments)
    assert (code, out) == (2, "")
    assert error.startswith("rlhf: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [[], ["rum"], ["run", "--only", "pppo"], ["run", "--nonsense"], ["cache"]])
def test_bad_usage_ends_with_2(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.commands.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "usage: rlhf" in done.stderr
    assert "Traceback" not in done.stderr


def test_deploy_without_a_server_says_where_it_looked(rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = f"http://127.0.0.1:{free_port()}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    with temporary_settings({PREFECT_API_URL: url}):
        code, out, error = rlhf("deploy", "demo")
    assert (code, out) == (2, "")
    assert error.startswith(f"rlhf: PREFECT_API_URL is '{url}', where deploying failed (ConnectError: ")


@pytest.mark.parametrize(
    "arguments",
    [["cache", "gc", "--keep", "0"], ["runs", "--last", "-1"], ["runs", "--last", "x"], ["sweep", "--runs", "0"]],
)
def test_a_count_of_none_is_refused(rlhf: Rlhf, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        rlhf(*arguments)
    assert ended.value.code == 2
    expected = f"argument {arguments[-2]}: {arguments[-1]!r}: expected a whole number of 1 or more"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("command", [("show", "demo"), ("presets",)])  # printed plainly, and by rich
def test_a_reader_that_goes_away_is_no_error(command: tuple[str, ...]) -> None:
    shown = subprocess.Popen(
        [sys.executable, "-u", "-m", "flows.commands.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert shown.stdout is not None
    shown.stdout.close()
    _, error = shown.communicate()
    assert (shown.returncode, error) == (0, b"")
