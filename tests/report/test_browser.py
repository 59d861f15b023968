"""The pages in a headless Chromium, where there is one: as a reader has them, from disk and without a network."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.artifacts import StageContext
from pipelines.stages import report
from tests.chromium import Chromium, installed
from tests.report.pages import make
from tests.report.test_compare import NAMES, configured, write_runs
from tests.report.test_page import contrast, write_whole_run

pytestmark = pytest.mark.skipif(installed() is None, reason="no Chromium is installed here")
DARK = {"name": "prefers-color-scheme", "value": "dark"}
LOUD = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
PROPERTY = "getComputedStyle(document.querySelector({!r})).{}"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a run with everything, and of two runs."""
    root = tmp_path_factory.mktemp("pages")
    write_whole_run(root / "whole")
    directory = make(root, "whole")[2]
    write_runs(root / "several")
    comparison = root / "comparison"
    comparison.mkdir()
    report.run(StageContext(configured(root / "several", *NAMES[:2]), "report", comparison))
    return {"report": directory / "index.html", "comparison": comparison / "index.html"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_nothing_is_said_in_the_console_and_nothing_asked_of_a_network(
    browser: Chromium, pages: dict[str, Path], name: str
) -> None:
    browser.open(pages[name])
    told = [event for event in browser.events if event["method"] in LOUD]
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert told == [] and asked == [pages[name].resolve().as_uri()]
    assert browser.evaluate("document.querySelector('h1').innerText.length") > 20


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_is_no_wider_than_the_screen(browser: Chromium, pages: dict[str, Path], name: str, width: int) -> None:
    browser.window(width)
    browser.open(pages[name])
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    # What is wider stands in a frame that scrolls by itself.
    outside = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide')
        && e.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.tagName + '.' + e.className)"""
    assert browser.evaluate(outside) == []
    assert browser.evaluate("[...document.querySelectorAll('figure svg')].every(e => e.clientWidth > 200)")


def colours(text: str) -> str:
    """ "rgb(35, 32, 29)" as "#23201d"."""
    found = re.findall(r"\d+", text)[:3]
    return "#" + "".join(f"{int(channel):02x}" for channel in found)


def test_dark_is_another_picture_and_text_is_read_in_both(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.window(1200)
    browser.open(pages["report"])
    shots, grounds = {}, {}
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        grounds[scheme] = colours(browser.evaluate(PROPERTY.format("body", "backgroundColor")))
        for text in ("h1", ".intro", "td.ours", "caption", ".gated.failed", "summary", "small"):
            colour = colours(browser.evaluate(PROPERTY.format(text, "color")))
            assert contrast(colour, grounds[scheme]) >= 4.5, (scheme, text, colour)
        # The drawings follow: none of their words is in the colour of the ground.
        words = "[...document.querySelectorAll('figure svg text')].map(e => getComputedStyle(e).fill)"
        for fill in set(browser.evaluate(words)):
            assert contrast(colours(fill), grounds[scheme]) >= 4.5, (scheme, fill)
        shots[scheme] = browser.screenshot()
    browser.scheme("light")
    assert shots["light"] != shots["dark"] and contrast(grounds["light"], grounds["dark"]) > 10


def test_it_prints_on_pages_that_hold_what_the_screen_shows(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.window(1200)
    browser.open(pages["report"])
    printed = browser.pdf()
    assert printed.startswith(b"%PDF-")
    counted = len(re.findall(rb"/Type\s*/Page\b", printed))
    assert 5 <= counted <= 40


def test_no_table_is_cut_on_paper_and_no_heading_stands_alone(browser: Chromium, pages: dict[str, Path]) -> None:
    """At the width of a page of US letter within its margins, in dark surroundings."""
    for name in ("report", "comparison"):
        browser.window(700)
        browser.open(pages[name])
        browser.call("Emulation.setEmulatedMedia", media="print", features=[DARK])
        outside = "[...document.querySelectorAll('table, figure, .sample')]"
        outside += ".filter(e => e.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.innerText)"
        assert browser.evaluate(outside) == []
        assert browser.evaluate(PROPERTY.format("body", "backgroundColor")) == "rgb(255, 255, 255)"
        assert browser.evaluate(PROPERTY.format("h1", "color")) == "rgb(17, 17, 17)"
        for kept in ("h2", "h3", ".intro:not(.small)"):
            assert browser.evaluate(PROPERTY.format(kept, "breakAfter")) == "avoid"
        assert browser.evaluate(PROPERTY.format("table", "breakInside")) == "avoid"
        if name == "report":  # what is folded says so instead of a heading with nothing below it
            folded = "getComputedStyle(document.querySelector('details:not([open]) > summary'), '::after').content"
            assert "folded" in browser.evaluate(folded)
    browser.call("Emulation.setEmulatedMedia", media="")


def test_a_browser_without_a_window_answers_what_is_asked(browser: Chromium, pages: dict[str, Path]) -> None:
    """The check of the checks: an error, a request and an overflow are seen."""
    bad = pages["report"].with_name("bad.html")
    bad.write_text(
        "<main><h1>Bad</h1><img src='missing.png'><p style='width:900px'>x</p></main><script>oh.no()</script>"
    )
    browser.window(360)
    browser.open(bad)
    assert [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"]
    assert "missing.png" in json.dumps([e for e in browser.events if e["method"] == "Network.requestWillBeSent"])
    assert not browser.evaluate("document.documentElement.scrollWidth <= 360")
