"""What a person does in Prefect's UI, in a real browser: fill in the form, read the table, run one stage again.

With ``RLHF_SCREENSHOTS`` naming a folder, pictures for the README are written there.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, sync_playwright

from tests.team.conftest import SECONDS, Up

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium, which .ci/run installs"),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of a headless Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(SECONDS * 1000)
        yield page
        browser.close()


def picture(page: Page, name: str) -> None:
    """Keep what the page shows, if anyone wants to have it."""
    if folder := os.environ.get("RLHF_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def field(page: Page, name: str) -> Locator:
    """A parameter of the form."""
    label = page.locator(".schema-form-property__label", has_text=name)
    return page.locator(".schema-form-property").filter(has=label).first


def choose(page: Page, name: str, value: str) -> None:
    """Choose a value of a parameter that has a select."""
    field(page, name).locator(".p-select-button__control").press("Space")
    page.locator(".p-select-option", has_text=value).first.click()


def submit(page: Page, up: Up) -> str:
    """Send the form off, and go to the run that it makes; its id."""
    with page.expect_response("**/create_flow_run") as answer:
        page.get_by_role("button", name="Submit").click()
    run = str(answer.value.json()["id"])
    page.goto(f"{up.prefect}/runs/flow-run/{run}")
    return run


def stage_table(page: Page, up: Up, run: str) -> dict[str, list[str]]:
    """The cells of the table of stages, as the browser shows it, by stage."""
    [artifact] = up.api(
        "POST", "artifacts/filter", artifacts={"flow_run_id": {"any_": [run]}, "key": {"any_": ["stages"]}}
    )
    page.goto(f"{up.prefect}/artifacts/artifact/{artifact['id']}")
    page.locator("table").first.wait_for()
    rows = [[cell.inner_text() for cell in row.locator("td").all()] for row in page.locator("table tr").all()]
    return {row[0]: row for row in rows if row}


def test_the_form_the_run_and_one_stage_again(up: Up, page: Page) -> None:
    page.goto(f"{up.prefect}/deployments/deployment/{up.deployment('preset/run')['id']}/run")
    field(page, "preset").wait_for()
    choose(page, "size", "smoke")
    overrides = field(page, "overrides")
    overrides.get_by_role("button", name="Add item").click()
    overrides.locator("textarea, input").last.fill("seed=11")
    picture(page, "form")
    first = submit(page, up)
    assert up.finish(first) == "COMPLETED"
    asked = up.api("GET", f"flow_runs/{first}")["parameters"]
    assert (asked["preset"], asked["size"], asked["overrides"]) == ("demo", "smoke", ["seed=11"])
    page.reload()
    page.get_by_text("Completed").first.wait_for()
    picture(page, "run")

    table = stage_table(page, up, first)
    picture(page, "stages")
    assert {stage: row[1] for stage, row in table.items()} == dict.fromkeys(table, "ran")
    assert list(table) == ["prepare", "sft", "judge", "reward", "ppo", "evaluate"]

    row = page.locator("table tr").filter(has=page.locator("td", has_text=re.compile(r"^ppo$")))
    page.goto(str(row.get_by_role("link", name="only").get_attribute("href")))
    field(page, "only").wait_for()
    assert field(page, "only").locator(".p-select-button__value").inner_text() == "ppo"
    again = submit(page, up)
    assert up.finish(again) == "COMPLETED"
    became = {stage: row[1] for stage, row in stage_table(page, up, again).items()}
    assert became == {"prepare": "cached", "sft": "cached", "judge": "cached", "reward": "cached", "ppo": "ran"}
