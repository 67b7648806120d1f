"""The view of runs that is provided in MLflow's UI: headline columns of all runs are filled, whatever was cached.

With ``RLHF_SCREENSHOTS`` naming a folder, the picture for the README is written there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from flows.team.server import free_port
from rlhf.runs.records import read_runs
from tasks.mlflow.server import VIEW, default_uri
from tasks.mlflow.sync import Shipped
from tasks.mlflow_run import COLUMNS
from tests.team.conftest import SECONDS, wait_for
from tests.team.test_browser import CHROMIUM, FLAGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium, which .ci/run installs"),
]
WIDTH, HEIGHT = 1440, 560
COEFFICIENTS = {"0.05": True, "0.1": True, "0.2": True, "0.4": False, "0.8": False}  # whether all stages are computed


@pytest.fixture
def home(rlhf: Callable[..., tuple[int, str, str]], tmp_path: Path) -> Path:
    """A home folder with five runs of the demo."""
    for coefficient, computed in COEFFICIENTS.items():
        anew = ("--from", "prepare") if computed else ()
        code, out, error = rlhf("run", "demo", "--size", "smoke", "--set", f"ppo.kl_coef={coefficient}", *anew)
        assert code == 0, out + error
    return tmp_path / "home"


@contextmanager
def mlflow_server(home: Path) -> Iterator[str]:
    """An MLflow server on the runs of a home folder; its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--artifacts-destination", (home / "mlartifacts").as_uri()),
        ],
        env={
            **os.environ,
            "MLFLOW_BACKEND_STORE_URI": default_uri(home),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        with suppress(OSError):
            return bool(urllib.request.urlopen(f"{url}/health", timeout=5).status == 200)
        return False

    try:
        wait_for(answers, "MLflow's server")
        yield url
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def opened(url: str, width: int) -> Iterator[Page]:
    """The provided view, with the parts around it folded away."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        page = browser.new_page(viewport={"width": width, "height": HEIGHT})
        page.set_default_timeout(SECONDS * 1000)
        page.goto(f"{url}/?workflowType=machine_learning#/experiments/1/runs?viewStateShareKey={VIEW}")
        page.locator(cell(column_id(COLUMNS[0]))).first.wait_for()
        for name in ("Close", "Hide banner", "Toggle sidebar"):  # the assistant, a hint, the menu
            button = page.get_by_role("button", name=name, exact=True)
            if button.count():
                button.first.click()
        yield page
        browser.close()


def column_id(column: str) -> str:
    """What the table of the UI calls a column."""
    kind, _, name = column.partition(".")
    return f"{kind}.`{name}`"


def cell(column: str) -> str:
    """Finds the cells of a column."""
    return f'[role=gridcell][col-id="{column}"]'


def test_headline_columns_are_filled_for_computed_and_cached_stages(home: Path, tmp_path: Path) -> None:
    records = read_runs(home)
    cached = [sum(row["cached"] for row in record.stages.values()) for record in records]
    assert cached == [0 if computed else 4 for computed in COEFFICIENTS.values()]
    assert all(Shipped.read(home / "runs" / record.id).complete for record in records)
    folder = Path(os.environ.get("RLHF_SCREENSHOTS", tmp_path))
    with mlflow_server(home) as url:
        with opened(url, 2 * WIDTH) as page:  # wide enough that all columns are in the page
            shown = {
                column: wait_for(
                    lambda column=column: full(page.locator(cell(column_id(column))).all_inner_texts()), column
                )
                for column in COLUMNS
            }
        with opened(url, WIDTH) as page:
            page.screenshot(path=folder / "mlflow.png")
    assert sorted(shown["params.ppo.kl_coef"]) == list(COEFFICIENTS)
    for column, texts in shown.items():
        assert all(re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text) for text in texts), (column, texts)
    assert (folder / "mlflow.png").stat().st_size < 400_000


def full(texts: list[str]) -> list[str]:
    """The texts, once there is one for each run; nothing before."""
    return texts if len(texts) == len(COEFFICIENTS) else []
