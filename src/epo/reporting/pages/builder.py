"""Puts a page together: one HTML file that loads nothing, whose policy lets only our own scripts run.

What came out of a model or an environment gets into it as JSON and base64 only.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from importlib.metadata import version
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from epo.errors import UserError
from epo.reporting.health import catalogue
from epo.reporting.reading.run_reader import RunData

STYLES = ("style", "viewer")
SCRIPTS = (
    *("core-dom", "core-format", "core-metrics", "core-plot", "core-runs", "core-source", "core"),
    *("charts-series", "charts-specs", "overview", "charts-picker", "charts", "figures", "health", "setup"),
    *("viewer-scale", "viewer-turns", "viewer-card", "viewer-list", "viewer-compare", "viewer-copy", "viewer"),
)
"""In the order in which they run."""

Mode = Literal["report", "live"]


def has_plotly() -> bool:
    """Whether plotly, whose scripts draw the charts, is installed."""
    return importlib.util.find_spec("plotly") is not None


def require_plotly() -> None:
    """Stop where pages cannot be made.

    Raises:
        UserError: plotly is not installed.
    """
    if not has_plotly():
        raise UserError("the page needs plotly, which is not installed. In a checkout: pip install -e '.[report]'")


def page_object(
    runs: Sequence[Mapping[str, Any]], *, mode: Mode, title: str, comparison: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the scripts of a page get. `runs` as by `RunData.page`."""
    return {
        "mode": mode,
        "title": title,
        "generated": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": version("epo-agents"),
        "alarms": catalogue(),
        "runs": list(runs),
        "comparison": comparison,
    }


def make_title(runs: Sequence[RunData]) -> str:
    name = runs[0].path.resolve().parent.name if len(runs) > 1 else runs[0].name
    text = f"{name}: {len(runs)} runs" if len(runs) > 1 else f"{name}: {runs[0].label}"
    return text.encode("utf-8", "replace").decode()


def render_page(page: Mapping[str, Any], *, blobs: Mapping[str, str]) -> tuple[str, str]:
    """The HTML of a page, and the content security policy that it carries.

    Args:
        page: as by `page_object`.
        blobs: base64 data by the id of its element.

    Raises:
        UserError: plotly is not installed.
    """
    require_plotly()
    scripts, hashes = _scripts()
    csp = content_security_policy(hashes, connect=page["mode"] == "live")
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    html = environment.from_string(_asset("index.html.j2")).render(
        title=page["title"],
        head=Markup("\n").join(
            [
                Markup('<meta http-equiv="Content-Security-Policy" content="{}">').format(csp),
                Markup('<meta name="referrer" content="no-referrer">'),
                Markup('<link rel="icon" href="data:,">'),  # browsers would ask the server for one
                *(Markup(f"<style>{_asset(f'{name}.css')}</style>") for name in STYLES),
            ]
        ),
        scripts=Markup("\n").join(
            [
                Markup(f'<script type="application/json" id="page-data">{json_for_html(page)}</script>'),
                *(
                    Markup(f'<script type="application/octet-stream" id="{name}">{data}</script>')
                    for name, data in blobs.items()
                ),
                *(Markup(f"<script>{script}</script>") for script in scripts),
            ]
        ),
    )
    return html, csp


def content_security_policy(hashes: Sequence[str], *, connect: bool) -> str:
    """A policy under which nothing runs but scripts of these SHA-256 hashes, and nothing is loaded.

    With `connect` the page may ask its own server.
    """
    allowed = "'self'" if connect else "'none'"
    sources = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {sources}",
            "style-src 'unsafe-inline'",
            "img-src data: blob:",
            f"connect-src {allowed}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def json_for_html(value: Any) -> str:
    """Strict JSON that can stand between script tags: ASCII, without the characters that HTML gives a meaning."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _scripts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What runs in a page, and the hashes of it."""
    from plotly.offline import get_plotlyjs

    texts = (_as_parsed(get_plotlyjs()), *(_asset(f"{name}.js") for name in SCRIPTS))
    return texts, tuple(base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)


def _asset(name: str) -> str:
    text = (resources.files("epo.reporting.pages") / "assets" / name).read_text(encoding="utf-8")
    return _as_parsed(text) if name.endswith(".js") else text


def _as_parsed(script: str) -> str:
    """`script` as a browser reads it from a page, which is what its hash must be of."""
    script = script.replace("\r\n", "\n").replace("\r", "\n")
    lowered = script.lower()
    assert "</script" not in lowered and "<!--" not in lowered and "\0" not in script, "not to be put inside a page"
    return script
