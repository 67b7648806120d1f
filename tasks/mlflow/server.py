"""The MLflow server, or the SQLite file in its place: how to reach it, its experiments, and the names it takes."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from rlhf.store import locked

if TYPE_CHECKING:
    from mlflow import MlflowClient

UI_URL = "RLHF_MLFLOW_UI_URL"  # where people's browsers find the server of MLFLOW_TRACKING_URI
VIEW = "rlhf"  # key of the view of the runs table that is provided: ...?viewStateShareKey=rlhf
# Answers to a request that the server will never take. Every other error may be over in a while.
_PERMANENT = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"})
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # seconds; with MLflow's defaults a dead server costs 4 minutes a request
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def default_uri(home: Path) -> str:
    """The MLflow store of one who names none: a SQLite file in the home folder, ``mlartifacts`` beside it."""
    return f"sqlite:///{home.resolve() / 'mlflow.db'}"


def tracking_uri(given: str | None, home: Path) -> str:
    """Where a run's metrics go: what its configuration says, else ``MLFLOW_TRACKING_URI``, else the home folder."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(home)


def ui_url(tracking_uri: str) -> str | None:
    """Where a browser finds a server, without user and password; None for a store that is not a server.

    That is ``RLHF_MLFLOW_UI_URL`` for the server of ``MLFLOW_TRACKING_URI``, whose name may mean something to workers
    only, and else the tracking URI.
    """
    if not tracking_uri.startswith("http"):
        return None
    public = os.environ.get(UI_URL) if tracking_uri == os.environ.get("MLFLOW_TRACKING_URI") else None
    return without_password(public or tracking_uri).rstrip("/")


def for_browsers(urls: Iterable[str]) -> dict[str, str]:
    """The environment in which MLflow's server takes what browsers send that see it under these addresses.

    It takes hosts and origins of its own machine anyway, of others only those that it is told: its protection from DNS
    rebinding and from forms of other sites. What the environment says already goes before.
    """
    parts = [urlsplit(url.lower()) for url in urls]
    found = {
        "MLFLOW_SERVER_ALLOWED_HOSTS": [
            "localhost",
            "127.0.0.1",
            "localhost:*",
            "127.0.0.1:*",
            *(p.netloc for p in parts),
        ],
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": [f"{part.scheme}://{part.netloc}" for part in parts],
    }
    return {name: os.environ.get(name) or ",".join(dict.fromkeys(values)) for name, values in found.items()}


def load() -> None:
    """Import MLflow, which takes a second or two, with our settings. Those in the environment go before them."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401


@lru_cache
def connect(tracking_uri: str) -> MlflowClient:
    """A client that gives up soon enough, of a store that is there."""
    load()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    if file := _sqlite_file(tracking_uri):
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_suffix(".lock")):  # of two processes that make the tables at once, one would fail
            client.search_experiments(max_results=1)
    return client


def experiment_id(client: MlflowClient, tracking_uri: str, name: str, columns: Collection[str] = ()) -> str:
    """The experiment of this name, made if need be, with a view of its runs that shows these columns.

    Raises:
        RuntimeError: the experiment was deleted; someone has to restore it, or choose another name.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # The kind opens the UI in its machine-learning mode, instead of the one for chat agents.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        with contextlib.suppress(MlflowException):  # another process may have made it meanwhile
            client.create_experiment(name, _artifact_location(tracking_uri, name), tags)
        experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise RuntimeError(f"the MLflow experiment {name!r} is deleted: restore it, or choose another name")
    tag = f"mlflow.sharedViewState.{VIEW}"
    if columns and experiment.tags.get(tag) != _view(columns):
        client.set_experiment_tag(experiment.experiment_id, tag, _view(columns))
    return str(experiment.experiment_id)


def is_permanent(error: Exception) -> bool:
    """Whether the same request would fail for ever: refused by the server, or about a file that is gone."""
    return error_code(error) in _PERMANENT or isinstance(error, FileNotFoundError)


def error_code(error: Exception) -> str:
    """MLflow's name for an error; empty for one that is not MLflow's."""
    return str(getattr(error, "error_code", ""))


def brief(error: BaseException) -> str:
    """An error in one line of at most 200 characters."""
    return without_password(" ".join(f"{type(error).__name__}: {error}".split()))[:200]


def without_password(uri: str) -> str:
    """A URI fit for logs and files: without user and password."""
    return re.sub(r"//[^/@\s]*@", "//", uri)


def key(name: str) -> str:
    """The name itself where MLflow takes it, else the nearest that it does."""
    return posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", name)).strip("/")[:250]


def tags(values: Mapping[str, str]) -> dict[str, str]:
    """Tags with names that MLflow takes, and values cut to the 8000 characters that it takes."""
    return {key(name): value[:8000] for name, value in values.items()}


def _sqlite_file(tracking_uri: str) -> Path | None:
    return Path(tracking_uri.removeprefix("sqlite:///")) if tracking_uri.startswith("sqlite:///") else None


def _artifact_location(tracking_uri: str, experiment: str) -> str | None:
    """Beside the SQLite file (MLflow would take the working directory); a server has a place of its own."""
    file = _sqlite_file(tracking_uri)
    return (file.resolve().parent / "mlartifacts" / quote(experiment, safe="")).as_uri() if file else None


def _view(columns: Collection[str]) -> str:
    """A saved view of the runs table, in the form that the UI of MLflow 3.17 reads and writes (undocumented)."""
    selected = [re.sub(r"^(metrics|params|tags)\.(.*)$", r"\1.`\2`", column) for column in columns]
    widths = {"attributes.`Run Name`": 120, "runDateAndNestInfo": 125, "duration": 70}  # pixels; these are always there
    widths |= {name: min(18 + 6 * len(name.partition("`")[2]), 170) for name in selected}
    state = json.dumps({"selectedColumns": selected, "columnOrder": list(widths), "columnWidths": widths})
    return json.dumps({"name": VIEW, "createdAt": 0, "updatedAt": 0, "state": state})
