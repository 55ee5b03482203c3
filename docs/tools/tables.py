"""mkdocs hook: `\\|` in code in a cell of a table is a bar, as on code forges; Python-Markdown keeps the backslash."""

from __future__ import annotations

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

CELL = re.compile(r"<td.*?</td>", re.DOTALL)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return CELL.sub(lambda cell: cell[0].replace("\\|", "|"), content)
