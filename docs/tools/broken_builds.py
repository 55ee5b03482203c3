"""Shows that `make docs` refuses what it should: small sites, each with one thing wrong, by the same command.

python docs/tools/broken_builds.py        # exit code 1, and a line for each broken site that was built all the same
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RIGHT = "# One\n\n[two](two.md#a-part) [data](../data/kept.json) [folder](../data) ![p](p.svg) $x_i$\n\n$$\ny^2\n$$\n"
WRONG = {
    "a page that is not there": "[x](three.md)",
    "a heading of another page": "[x](two.md#nothing)",
    "a heading of this page": "[x](#nothing)",
    "a file outside of docs/": "[x](../data/none.json)",
    "a folder outside of docs/": "[x](../none)",
    "a picture": "![x](none.svg)",
    "a formula in the text": "Here $x_{$ stands.",
    "a formula by itself": "$$\n\\left( x\n$$",
    "a name of the API": "::: epo.errors.NoSuchError",
}
LEFT_OUT = "a page that the navigation leaves out"


def errors() -> list[str]:
    """What was built although it should not have been, and the other way round."""
    if not _builds(RIGHT):
        return ["the sound site was refused, so refusals mean nothing"]
    built = [name for name, text in WRONG.items() if _builds(f"{RIGHT}\n{text}\n")]
    built += [LEFT_OUT] if _builds(RIGHT, left_out="# Three\n") else []
    return [f"a site was built although this is wrong in it: {name}" for name in built]


def _builds(page: str, *, left_out: str | None = None) -> bool:
    """Whether a strict build of a small site, with our settings, ends well."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        texts = {
            "docs/one.md": page,
            "docs/two.md": "# Two\n\n## A part\n",
            "docs/p.svg": '<svg xmlns="http://www.w3.org/2000/svg"/>',
            "data/kept.json": "{}",
            "README.md": "# Read me\n\n[one](docs/one.md)\n",
            "CONTRIBUTING.md": "# Contributing\n",
            "CHANGELOG.md": "# Changes\n",
            "benchmarks/results/README.md": "# Kept\n\n[one](../../docs/one.md) [readme](../../README.md)\n",
            "mkdocs.yml": _settings(),
        } | ({} if left_out is None else {"docs/three.md": left_out})
        for name, text in texts.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(root / "mkdocs.yml")]
        return subprocess.run(command, capture_output=True, timeout=120).returncode == 0


def _settings() -> str:
    hooks = "".join(f"  - {ROOT / 'docs' / 'tools' / name}\n" for name in ("links.py", "formulas.py"))
    pages = ("one", "two", "readme", "contributing", "changelog", "kept-results")
    return (
        f"INHERIT: {ROOT / 'mkdocs.yml'}\nhooks:\n{hooks}extra_css: []\nextra: {{polyfills: []}}\n"
        f"plugins:\n  mkdocstrings: {{handlers: {{python: {{paths: [{ROOT / 'src'}]}}}}}}\n"
        "nav:\n" + "".join(f"  - {name}.md\n" for name in pages)
    )


if __name__ == "__main__":
    sys.exit("\n".join(errors()) or 0)
