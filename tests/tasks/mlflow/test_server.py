"""The addresses of MLflow's server."""

from __future__ import annotations

import pytest
from mlflow.server.security_utils import is_allowed_host_header, should_block_cors_request

from tasks.mlflow.server import UI_URL, for_browsers, ui_url


def test_the_address_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(UI_URL, raising=False)
    assert ui_url("sqlite:///mlflow.db") is None
    assert ui_url("http://user:pass@mlflow:5000/") == "http://mlflow:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv(UI_URL, "https://mlflow.example.org/")
    assert ui_url("http://mlflow:5000") == "https://mlflow.example.org"
    assert ui_url("http://another:5000") == "http://another:5000"  # whose address for people is not known


@pytest.mark.parametrize(
    ("host", "origin", "allowed"),
    [
        ("mlflow.example.org", "https://mlflow.example.org", True),
        ("10.0.0.5:5000", "http://10.0.0.5:5000", True),
        ("localhost:5000", "http://localhost:5000", True),
        ("127.0.0.1:5000", "", True),
        ("mlflow.example.org", "https://example.org", False),
        ("example.org", "https://mlflow.example.org", False),
    ],
)
def test_what_a_browser_sends_is_taken(monkeypatch: pytest.MonkeyPatch, host: str, origin: str, allowed: bool) -> None:
    """As MLflow itself decides."""
    hosts, origins = "MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"
    found = for_browsers(["https://MLflow.example.org/", "http://10.0.0.5:5000"])
    taken = is_allowed_host_header(found[hosts].split(","), host)
    assert (taken and not should_block_cors_request(origin, "POST", found[origins].split(","))) == allowed
    monkeypatch.setenv(hosts, "*")
    assert for_browsers([])[hosts] == "*"  # what the user has set stays
