"""The report in a real browser without a network: no error, no fault of accessibility, on a desk, a phone and paper.

With ``RLHF_SCREENSHOTS`` naming a folder, pictures for the docs are written there, of the report ``RLHF_REPORT``:
``RLHF_REPORT=$(rlhf report) RLHF_SCREENSHOTS=docs/images pytest tests/processes/test_report_browser.py -k picture``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from rlhf.report.page import page as write_page
from tests.rlhf import report_sources as made

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium, which .ci/run installs")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")
DESK, PHONE = 1440, 390
THEMES = ("light", "dark")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report with texts that would break a page; five of its samples have a word of their own."""
    folder = tmp_path_factory.mktemp("report")
    table = made.samples(60)
    for row in range(5):
        table["ppo"][row] = f"Alpha beta gamma delta, number {row}: zebra\n{made.EVIL}"
        table["sft"][row] = f"Alpha gamma epsilon delta, number {row}: zebra\n{made.EVIL}"
    path = folder / "report.html"
    path.write_text(write_page(made.sources(folder / "made", table=table)), encoding="utf-8")
    return path.as_uri()


class Seen:
    """A page, and what the browser complained of."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.set_default_timeout(120_000)  # milliseconds; a busy machine is no fault
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.complaints.append(request.url) if request.url != address else None)
        page.goto(address)


def opened(browser: Browser, address: str, width: int = DESK, theme: Any = "light", **more: Any) -> Seen:
    """The page in a context of its own that has no network."""
    viewport: Any = {"width": width, "height": 900}
    context = browser.new_context(viewport=viewport, color_scheme=theme, offline=True, **more)
    return Seen(context.new_page(), address)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_opens_without_a_network_an_error_or_sideways_scrolling(
    browser: Browser, address: str, width: int, theme: str
) -> None:
    seen = opened(browser, address, width, theme)
    assert seen.page.get_by_text("PPO is better than SFT").is_visible()
    assert seen.page.evaluate("document.documentElement.scrollWidth") == width
    seen.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert seen.page.evaluate("document.documentElement.scrollWidth") == width
    assert seen.complaints == []


@pytest.mark.parametrize(("width", "height"), [(DESK, 1750), (PHONE, 1600)])
def test_a_picture_of_it_is_small_enough_for_the_docs(
    browser: Browser, address: str, width: int, height: int, tmp_path: Path
) -> None:
    shown = Path(os.environ["RLHF_REPORT"]).resolve().as_uri() if "RLHF_REPORT" in os.environ else address
    page = opened(browser, shown, width).page
    page.set_viewport_size({"width": width, "height": height})
    path = Path(os.environ.get("RLHF_SCREENSHOTS", tmp_path)) / f"report-{width}.png"
    page.screenshot(path=path)
    assert 20_000 < path.stat().st_size < 400_000


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_axe_finds_no_serious_fault(browser: Browser, address: str, width: int, theme: str) -> None:
    seen = opened(browser, address, width, theme)
    seen.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    seen.page.evaluate(resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found = seen.page.evaluate("axe.run({ resultTypes: ['violations'] })")
    faults = {
        (one["id"], node["html"][:120])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    }
    assert faults == set()
    assert len(found["passes"]) > 20


OUTSIDE_OR_TOUCHING = """
[...document.querySelectorAll("svg.chart")].filter((chart) => chart.checkVisibility()).flatMap((chart) => {
  const box = chart.getBoundingClientRect();
  const texts = [...chart.querySelectorAll("text")].map((one) => ({
    said: one.textContent, at: one.getBoundingClientRect(),
  }));
  const outside = ({ at }) =>
    at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1 || at.bottom > box.bottom + 1;
  const touch = (p, q) =>
    p.left < q.right - 1 && q.left < p.right - 1 && p.top + 2 < q.bottom - 2 && q.top + 2 < p.bottom - 2;
  return [
    ...texts.filter(outside).map(({ said }) => `outside: ${said}`),
    ...texts.flatMap((a, i) =>
      texts.slice(i + 1).filter((b) => touch(a.at, b.at)).map((b) => `${a.said} on ${b.said}`)),
  ].map((fault) => `${chart.querySelector("title").textContent}: ${fault}`);
})
"""


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_no_text_of_a_chart_is_clipped_or_on_another(browser: Browser, address: str, width: int) -> None:
    assert opened(browser, address, width).page.evaluate(OUTSIDE_OR_TOUCHING) == []


def test_search_shows_the_samples_with_all_words(browser: Browser, address: str) -> None:
    page = opened(browser, address, PHONE).page
    assert page.locator(".sample:visible").count() == 20
    assert page.locator("#count").inner_text() == "20 of 60 shown"
    page.get_by_label("Search").fill("ZEBRA number")
    assert page.locator(".sample:visible").count() == 5
    assert page.locator("#count").inner_text() == "5 of 5 shown"
    assert not page.get_by_role("button", name="Show more").is_visible()
    page.get_by_label("Search").fill("zebra nowhere")
    assert page.locator(".sample:visible").count() == 0
    page.get_by_label("Search").fill("")
    page.get_by_role("button", name="Show more").click()
    assert page.locator(".sample:visible").count() == 40


def test_words_that_differ_are_marked_between_any_two(browser: Browser, address: str) -> None:
    seen = opened(browser, address)
    sample = seen.page.locator(".sample").filter(has_text="number 0: zebra").first

    def marked(who: str, tag: str) -> list[str]:
        return sample.locator(f".answer[data-who={who}] {tag}").all_inner_texts()

    assert marked("ppo", "ins") == ["beta"]
    assert marked("sft", "del") == ["epsilon"]
    text = sample.locator(".answer[data-who=ppo] .text")
    assert text.inner_text().startswith("Alpha beta gamma delta, number 0: zebra\n</script><script>alert")
    seen.page.get_by_label("Words that are not in").select_option("reference")
    assert marked("sft", "del") == []
    assert "zebra" in marked("ppo", "ins")
    assert marked("reference", "del") == ["first", "0"]
    seen.page.get_by_label("are marked in").select_option("reference")
    assert sample.locator("ins, del").count() == 0
    assert seen.complaints == []


def test_the_theme_can_be_chosen(browser: Browser, address: str) -> None:
    page = opened(browser, address, theme="light").page

    def paper() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = paper()
    page.get_by_text("Dark", exact=True).click()
    dark = paper()
    page.get_by_text("Light", exact=True).click()
    assert dark != light == paper()


def test_without_scripts_everything_is_there(browser: Browser, address: str) -> None:
    seen = opened(browser, address, PHONE, java_script_enabled=False)
    assert seen.page.locator(".sample:visible").count() == 60
    assert not seen.page.get_by_label("Search").is_visible()
    assert seen.page.locator("nav a:visible").count() > 10
    assert seen.complaints == []


def test_on_paper_all_is_open_and_light(browser: Browser, address: str, tmp_path: Path) -> None:
    page = opened(browser, address, theme="dark").page
    assert not page.get_by_text("Gradient norm").locator("xpath=..").get_by_role("table").is_visible()
    assert page.pdf(path=tmp_path / "report.pdf")[:5] == b"%PDF-"
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.get_by_label("Search").is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 10
