"""One self-contained page per run: what was asked, what came out, the curves, the last step in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

from epo.config import Config
from epo.files import write_atomically


def write_report(
    path: Path, *, summary: dict[str, Any], config: Config, plot: Path, metrics: Sequence[dict[str, Any]]
) -> None:
    """Write the page. What came out of a model or an environment is escaped; nothing is loaded from elsewhere."""
    template = (resources.files(__name__.rpartition(".")[0]) / "report.html.j2").read_text(encoding="utf-8")
    # The plot is our own SVG; its XML prologue does not belong inside a page.
    svg = plot.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    page = Environment(autoescape=True).from_string(template)
    last = metrics[-1] if metrics else {}
    write_atomically(path, page.render(summary=summary, config=config.to_yaml(), svg=svg, last=last))
