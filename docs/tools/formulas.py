"""mkdocs hook: formulas between dollars become MathML when the site is built, so no page needs a script for them.

A browser needs a font with mathematical measures to set it well, and not every system has one: STIX Two Math (SIL Open
Font License) goes along, out of the package ziamath, of which nothing else is used.
"""

from __future__ import annotations

import html
import importlib.util
import logging
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.formulas")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
FONT = "fonts/STIXTwoMath-Regular.ttf"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the font."""
    package = importlib.util.find_spec("ziamath")
    assert package is not None and package.origin is not None, "requirements/docs.txt has it"
    files.append(File.generated(config, FONT, abs_src_path=str(Path(package.origin).parent / FONT)))
    return files


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces what the markdown extension `pymdownx.arithmatex` marked, in its generic mode."""

    def mathml(match: re.Match[str]) -> str:
        source = html.unescape(match[2]).strip()
        display = "block" if match[1] == "div" else "inline"
        try:
            return convert(source, display=display)
        except Exception as error:  # whatever the parser stumbles over
            log.warning("%s: the formula %r cannot be converted: %r", page.file.src_uri, source, error)
            return match[0]

    return FORMULA.sub(mathml, content)
