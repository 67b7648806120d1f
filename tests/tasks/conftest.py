"""What tests of MLflow share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tasks.mlflow.server import default_uri


@pytest.fixture(scope="module")
def store(mlflow_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite store for all tests of a file."""
    home = tmp_path_factory.mktemp("store")
    shutil.copy(mlflow_tables, home / "mlflow.db")
    return default_uri(home)
