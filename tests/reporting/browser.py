"""A browser for tests of pages: where Chromium is, and what a page must not do while a test looks at it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
DESKTOP: ViewportSize = {"width": 1280, "height": 900}
PHONE: ViewportSize = {"width": 400, "height": 800}


def find_chromium() -> str:
    """Path of Chromium: `$EPO_CHROMIUM`, else the first of `NAMES` on the path. Without one the test fails."""
    named = os.environ.get("EPO_CHROMIUM")
    if named:
        if not Path(named).is_file():
            pytest.fail(f"EPO_CHROMIUM={named} is not there: name the browser's executable", pytrace=False)
        return named
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(
            "the tests of pages need Chromium, and there is none on the path: apt install chromium, "
            "or EPO_CHROMIUM=/path/to/chrome",
            pytrace=False,
        )
    return found


@contextmanager
def launched() -> Iterator[Browser]:
    """Headless Chromium."""
    executable = find_chromium()
    with sync_playwright() as playwright:
        # Without a sandbox of its own, as containers ask for; it opens nothing but our pages.
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def watch(page: Page, problems: list[str], *, server: str | None = None) -> None:
    """Collect in `problems` what a page must never do: log an error or a warning, fail in a script, open a dialog,
    load anything but itself and its own `server`."""

    def on_request(url: str) -> None:
        parts = urlsplit(url)
        is_own = parts.scheme in ("file", "data", "blob", "about") or (server is not None and url.startswith(server))
        if not is_own:
            problems.append(f"request: {url}")

    page.on("console", lambda m: problems.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: on_request(request.url))


def point_at(page: Page, chart: str, *, text: str) -> str:
    """Move over a chart until its label shows `text`, and return the label. Charts may still be at work when they are
    first pointed at, so the pointer moves on until they answer."""
    area = page.locator(f"#chart-{chart} .nsewdrag").first
    area.scroll_into_view_if_needed()
    label = page.locator(f"#chart-{chart} .hoverlayer")
    for attempt in range(100):
        box = area.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] * (0.4 + 0.002 * attempt), box["y"] + box["height"] / 2)
        page.wait_for_timeout(100)
        if text in (found := label.text_content() or ""):
            return found
    raise AssertionError(f"{chart}: no label with {text!r}")
