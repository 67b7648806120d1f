"""What ``rlhf up`` tells the programs that it starts; that they work together is tested in ``tests/team``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.engine import make_url

from flows.commands.up import add_arguments
from flows.team import up
from rlhf.errors import ConfigError


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test's own."""
    before = dict(os.environ)
    for name in ("PREFECT_UI_URL", "RLHF_MLFLOW_UI_URL", "MLFLOW_TRACKING_URI", "RLHF_PROJECT"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_addresses_are_those_that_a_browser_opens(tmp_path: Path) -> None:
    given = options("--host", "0.0.0.0")
    found = up._set_environment(tmp_path, given)
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert "0.0.0.0" not in found.prefect + found.mlflow
    assert (os.environ["PREFECT_UI_URL"], os.environ["RLHF_MLFLOW_UI_URL"]) == (found.prefect, found.mlflow)
    assert found.mlflow in up._programs(given, tmp_path)[1]._environment["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"]


def test_addresses_that_the_user_names_stay(tmp_path: Path) -> None:
    os.environ |= {"PREFECT_UI_URL": "https://prefect.example.org", "RLHF_MLFLOW_UI_URL": "https://ml.example.org"}
    found = up._set_environment(tmp_path, given := options("--host", "10.0.0.5"))
    assert (found.prefect, found.mlflow) == ("https://prefect.example.org", "https://ml.example.org")
    assert os.environ["PREFECT_API_URL"] == "http://10.0.0.5:4200/api"
    told = up._programs(given, tmp_path)[1]._environment
    assert told["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] == "https://ml.example.org,http://10.0.0.5:5000"
    assert told["MLFLOW_SERVER_ALLOWED_HOSTS"].endswith("ml.example.org,10.0.0.5:5000")


def test_the_worker_works_in_the_folder_of_rlhf_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    up._set_environment(tmp_path, given := options())
    monkeypatch.chdir(tmp_path)
    assert up._programs(given, tmp_path)[2]._environment["RLHF_PROJECT"] == str(tmp_path)
    os.environ["RLHF_PROJECT"] = "/srv/project"
    assert up._programs(given, tmp_path)[2]._environment["RLHF_PROJECT"] == "/srv/project"


def test_the_drivers_of_one_database_have_different_names_for_tls() -> None:
    assert up._prefect_database("rlhf@db:5432/rlhf") == "postgresql+asyncpg://rlhf@db:5432/rlhf"
    url = up._prefect_database("rlhf@db:5432/rlhf?sslmode=verify-full")
    _, keywords = dialect().create_connect_args(make_url(url))
    assert keywords == {"user": "rlhf", "host": "db", "port": 5432, "database": "rlhf", "ssl": "verify-full"}
    with pytest.raises(ConfigError, match="'sslrootcert' is not one that Prefect and MLflow both take"):
        up._prefect_database("rlhf@db/rlhf?sslmode=require&sslrootcert=ca.pem")


@pytest.mark.parametrize(
    "rest", ["rlhf:secret@127.0.0.1:1/rlhf", "rlhf:secret@db:port/rlhf", "rlhf@db/rlhf?colour=red"]
)
def test_a_database_that_cannot_be_used_is_bad_input(rest: str) -> None:
    with pytest.raises(ConfigError, match="--database-url: PostgreSQL does not answer, or refuses: ") as raised:
        up._mlflow_database(rest)
    assert "secret" not in str(raised.value)
