"""mkdocs hook: links that leave `docs/` work on the site as they do in the repository.

A page links to `../benchmarks/results/cost.json` by the path that a reader of the repository needs. The site gets a
copy of every such file under `repository/`, and a list for every such folder, so that it is whole by itself. A target
that does not exist is left to mkdocs, which warns of it, and a strict build fails. `README.md`, `CONTRIBUTING.md`,
`CHANGELOG.md` and the table of kept results become pages.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

OUTSIDE = re.compile(r"\]\((\.\./[^)\s#]+)")
RELATIVE = re.compile(r"\]\((?![a-z]+:|#)([^)\s]+)")
NAMED_BY_FILE = re.compile(r">([a-z0-9-]+)\.md</a>")
PAGES = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/results/README.md": "kept-results.md",
}
COPIES = "repository"
IGNORED = {"__pycache__", ".pytest_cache"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie beside `docs/`, and what pages link to outside of it."""
    root = Path(config.docs_dir).parent
    for name, uri in PAGES.items():
        folder = posixpath.join("..", posixpath.dirname(name))
        text = RELATIVE.sub(
            lambda link, folder=folder: f"]({posixpath.normpath(posixpath.join(folder, link[1]))}",
            (root / name).read_text(encoding="utf-8"),
        )
        files.append(File.generated(config, uri, content=text.replace("](../docs/", "](")))
    linked = {uri: root / uri.removeprefix("../") for uri in _targets(files) - {f"../{name}" for name in PAGES}}
    copies = {uri: path for uri, path in linked.items() if path.is_file()}
    for uri, folder in linked.items():
        if folder.is_dir():
            inside = [p for p in sorted(folder.rglob("*")) if p.is_file() and not IGNORED.intersection(p.parts)]
            copies |= {f"../{path.relative_to(root).as_posix()}": path for path in inside}
            files.append(_listing(config, uri, [path.relative_to(folder).as_posix() for path in inside]))
    for uri, path in copies.items():
        files.append(_copy(config, uri, path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links to the pages beside `docs/` at what they are on the site."""
    for name, uri in PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({uri}")
    return markdown


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link that is called by its file, such as `metrics.md`, has the page's name on the site."""
    return NAMED_BY_FILE.sub(r">\1</a>", content)


def _targets(files: Files) -> set[str]:
    pages = [file for file in files.documentation_pages() if "/" not in file.src_uri]
    return {posixpath.normpath(uri) for page in pages for uri in OUTSIDE.findall(page.content_string)}


def _copy(config: MkDocsConfig, uri: str, path: Path) -> File:
    file = File.generated(config, uri, abs_src_path=str(path), inclusion=InclusionLevel.INCLUDED)
    file.dest_uri = f"{COPIES}/{uri.removeprefix('../')}"
    return file


def _listing(config: MkDocsConfig, uri: str, names: list[str]) -> File:
    title = html.escape(uri.removeprefix("../"))
    rows = "".join(f'<li><a href="{html.escape(name)}">{html.escape(name)}</a></li>' for name in names)
    page = f'<!doctype html><meta charset="utf-8"><title>{title}</title><h1>{title}</h1><ul>{rows}</ul>'
    file = File.generated(config, uri, content=page, inclusion=InclusionLevel.INCLUDED)
    file.dest_uri = f"{COPIES}/{uri.removeprefix('../')}/index.html"
    return file
