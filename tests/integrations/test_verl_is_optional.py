"""`epo.integrations.verl` where verl is not installed, and who imports the room. With verl: crosscheck/integrations."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src/epo"


@pytest.mark.skipif(importlib.util.find_spec("verl") is not None, reason="verl is installed")
def test_without_verl_the_error_says_what_to_install() -> None:
    code = (
        "from epo.errors import UserError\n"
        "try:\n"
        "    import epo.integrations.verl\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == ""
    assert done.stdout.strip() == ("epo.integrations.verl needs verl, which is not installed: pip install verl==0.9.1")


def test_nothing_else_of_epo_imports_the_integrations() -> None:
    importers = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.startswith("epo.integrations") for name in names):
                importers.add(path.relative_to(SOURCES).parts[0])
    assert importers <= {"integrations"}
