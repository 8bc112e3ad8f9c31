"""The report page in headless Chromium: it renders, its slider works, it asks nobody for anything.

Skipped where Chromium is not installed (Debian: ``apt-get install chromium``).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tokenpass
from tests import tiny
from tests.page.pictures import png
from tokenpass import HiPrune

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
KEEPS = (0.25, 0.5, 0.75, 1.0)
GRID = (tiny.SIDE // tiny.PATCH,) * 2

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=240_000
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, ...]]]:
    """A page, and the tokens that stay at each budget."""
    model, images = tiny.encoder(depth=4), tiny.images(1)
    report = tokenpass.explain(model, images, method=HiPrune(keep=0.5))
    refused = tokenpass.Report(report.graphs, [tokenpass.Refusal("on purpose", "node_7")])
    kept = tokenpass.kept_by_budget(model, images, keeps=KEEPS)
    page = tokenpass.html_report(refused, image=png(64), kept=kept, grid=GRID)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page, encoding="utf-8")
    return path, [choice.positions for choice in kept]


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that notes what it asks for, and what goes wrong in it."""
    opened = browser.new_page()
    opened.set_default_timeout(120_000)
    opened.asked, opened.wrong = [], []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.on("console", lambda message: opened.wrong.append(message.text))
    opened.on("pageerror", lambda error: opened.wrong.append(str(error)))
    yield opened
    opened.close()


def staying(page: Any) -> list[int]:
    """Positions of the cells that are not darkened, as they look."""
    looks = "cells => cells.map(c => getComputedStyle(c).fillOpacity)"
    opacities = page.locator("#dropped rect").evaluate_all(looks)
    return [position for position, opacity in enumerate(opacities) if float(opacity) == 0]


@pytest.mark.slow
def test_slider_shows_which_tokens_stay(
    page: Any, written: tuple[Path, list[tuple[int, ...]]]
) -> None:
    """Breaks if the slider does nothing, or lightens other cells than the tokens that stay."""
    path, positions = written
    page.goto(path.as_uri())
    assert page.locator("#dropped rect").count() == tiny.TOKENS
    slider = page.get_by_role("slider")
    slider.focus()
    page.keyboard.press("Home")
    for keep, expected in zip(KEEPS, positions, strict=True):
        assert staying(page) == list(expected)
        said = page.locator("#said").inner_text()
        assert said.startswith(f"{keep:.2f}: {len(expected)} of {tiny.TOKENS} patch tokens stay")
        assert slider.get_attribute("aria-valuetext") == said
        page.keyboard.press("ArrowRight")
    assert not page.wrong


def test_cells_lie_on_the_picture(page: Any, written: tuple[Path, list[tuple[int, ...]]]) -> None:
    """Breaks if the cells do not cover the picture row by row."""
    page.goto(written[0].as_uri())
    image = page.locator(".picture img").bounding_box()
    cells = page.locator("#dropped rect")
    for position in (0, 3, 5, tiny.TOKENS - 1):
        box = cells.nth(position).bounding_box()
        row, column = divmod(position, GRID[1])
        expected = (
            image["x"] + column * image["width"] / GRID[1],
            image["y"] + row * image["height"] / GRID[0],
            image["width"] / GRID[1],
            image["height"] / GRID[0],
        )
        assert tuple(box.values()) == pytest.approx(expected, abs=0.5)


def test_refusals_open(page: Any, written: tuple[Path, list[tuple[int, ...]]]) -> None:
    """Breaks if a refusal cannot be opened."""
    page.goto(written[0].as_uri())
    node = page.get_by_text("node_7")
    assert not node.is_visible()
    page.get_by_text("on purpose").click()
    assert node.is_visible()


@pytest.mark.parametrize("width", [360, 1200])
def test_page_fits_its_window(
    page: Any, written: tuple[Path, list[tuple[int, ...]]], width: int
) -> None:
    """Breaks if a reader has to scroll sideways, or the figure is not drawn."""
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(written[0].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".tokenpass svg rect").count() == 5
    box = page.locator(".tokenpass svg").bounding_box()
    assert box["width"] > 0.8 * min(width, 640)


def test_nothing_is_asked_for_outside(
    page: Any, written: tuple[Path, list[tuple[int, ...]]]
) -> None:
    """Breaks if the page loads anything; the second page shows that this would be seen."""
    path, _ = written
    page.goto(path.as_uri())
    page.keyboard.press("Tab")
    outside = [url for url in page.asked if not url.startswith("data:")]
    assert outside == [path.as_uri()]
    page.asked.clear()
    loads = path.with_name("loads.html")
    loads.write_text('<img src="other.png">')
    page.goto(loads.as_uri())
    assert loads.with_name("other.png").as_uri() in page.asked


def test_policy_stops_what_would_be_loaded(
    page: Any, written: tuple[Path, list[tuple[int, ...]]]
) -> None:
    """Breaks if the page's own policy would let a picture in from outside."""
    path, _ = written
    changed = path.with_name("changed.html")
    changed.write_text(path.read_text().replace("<h1>", '<img src="other.png"><h1>'))
    page.goto(changed.as_uri())
    assert any("Content Security Policy" in text for text in page.wrong)
