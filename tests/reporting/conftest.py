"""Fixtures for what people look at: one browser for the session, pages under watch, made-up runs and their reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import DESKTOP, launched, watch
from page_runs import make_run
from playwright.sync_api import Browser, Page, ViewportSize, expect

from epo.reporting.pages.report import write_report
from epo.reporting.reading.run_reader import read_run

# A busy machine takes its time.
expect.set_options(timeout=20_000)

Open = Callable[..., Page]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium, started once; without one the tests that use it fail and say what to install."""
    with launched() as chromium:
        yield chromium


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """`open_page(address, theme="dark", size=PHONE)`: a new page, at a file or a server. The test fails if any of its
    pages logs an error or a warning, fails in a script, or loads anything but itself."""
    problems: list[str] = []
    contexts = []

    def go(
        address: str | Path,
        fragment: str = "",
        *,
        theme: str = "light",
        size: ViewportSize = DESKTOP,
        server: str | None = None,
        has_touch: bool = False,
    ) -> Page:
        context = browser.new_context(viewport=size, color_scheme=theme, has_touch=has_touch)  # pyright: ignore
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)  # a busy machine takes its time
        watch(page, problems, server=server)
        url = address.as_uri() if isinstance(address, Path) else address
        page.goto(url + (f"#{fragment}" if fragment else ""))
        return page

    yield go
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page-runs")


@pytest.fixture(scope="session")
def single_report(runs_folder: Path) -> Path:
    """The report of one run with evaluations, entropies by turn, alarms that fired, and trajectories."""
    run = make_run(runs_folder / "single", method="epo", seed=0, trajectories=True)
    path = runs_folder / "single.html"
    write_report(path, [read_run(run)])
    return path


@pytest.fixture(scope="session")
def comparison_report(runs_folder: Path) -> Path:
    """The report of two arms, PPO with and without EPO, with two seeds each."""
    folder = runs_folder / "sweep"
    runs = [
        make_run(folder / f"{method}-{seed}", method=method, seed=seed) for method in ("none", "epo") for seed in (0, 1)
    ]
    path = runs_folder / "comparison.html"
    write_report(path, [read_run(run) for run in runs])
    return path
