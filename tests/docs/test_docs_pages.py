"""Links of pages lead somewhere, generated pages are up to date, and every page is in the navigation."""

from __future__ import annotations

import posixpath
import re
import runpy
from pathlib import Path

import pytest
from docs_pages import ROOT, Page, pages

import epo.objectives

PAGES = pages()


def link_problems(page: Page) -> list[str]:
    """Relative links of a page, as a reader of the repository follows them, to files or headings that are not there."""
    found: list[str] = []
    for number, link in page.links():
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = Path(posixpath.normpath(page.path.parent / name)) if name else page.path
        if name and not target.exists():
            found.append(f"{page.name}:{number}: no file {link}")
        elif anchor and anchor not in (page if target == page.path else Page.read(target)).anchors():
            found.append(f"{page.name}:{number}: no heading {link}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page: Page) -> None:
    assert not link_problems(page)


def test_a_dead_link_is_noticed() -> None:
    text = (
        "# One `thing`, and more\n\n## Two\n\n## Two\n\n[a](#one-thing-and-more) [b](#two-1) [c](metrics.md) "
        "[d](../examples/trl_epo.py) ![e](images/soak.svg) [f](https://nowhere) `[g](x.md)` [h](models.md#adapters)\n"
    )
    assert not link_problems(Page(path=ROOT / "docs" / "made-up.md", text=text))
    dead = "[a](#none) [b](metrix.md) [c](../examples/none.py) ![d](images/none.svg) [e](models.md#none)\n"
    assert len(link_problems(Page(path=ROOT / "docs" / "made-up.md", text=dead))) == 5


@pytest.mark.parametrize(
    ("page", "program"), [("configuration.md", "configuration_page.py"), ("commands.md", "command_page.py")]
)
def test_a_generated_page_is_what_the_code_says(page: str, program: str) -> None:
    kept = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert kept == runpy.run_path(str(ROOT / "docs" / "tools" / program))["page"](), "run `make docs`"


def test_the_figures_of_the_concepts_are_what_their_program_draws() -> None:
    program = runpy.run_path(str(ROOT / "docs" / "tools" / "figures.py"), run_name="figures")
    for name, drawing in program["drawings"]().items():
        kept = (ROOT / "docs" / "images" / name).read_text(encoding="utf-8")
        assert kept == drawing, f"run `make docs`: {name} differs"


def test_the_page_of_the_api_has_every_public_name_of_the_objectives() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    missing = [name for name in epo.objectives.__all__ if not re.search(rf"[.`]{name}$|`{name}`", page, re.MULTILINE)]
    assert not missing


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    missing = [path.name for path in (ROOT / "docs").glob("*.md") if path.name not in navigation]
    assert not missing
