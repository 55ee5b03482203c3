"""What works with torch alone: the objectives, the example, and an honest word from the command line."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "your_own_trainer.py"

NOTHING_ELSE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Nothing())
"""


def blocked() -> set[str]:
    """Import names of what only the extra `train` brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[>=<]", requirement)[0] for requirement in project["optional-dependencies"]["train"]}
    return {"yaml" if name == "pyyaml" else name.replace("-", "_") for name in names}


def run(code: str) -> subprocess.CompletedProcess[str]:
    program = NOTHING_ELSE.format(blocked=blocked()) + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)


def test_the_package_alone_asks_for_torch_and_numpy() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [re.split(r"[>=<]", requirement)[0] for requirement in project["dependencies"]] == ["torch", "numpy"]


def test_the_example_is_short_and_learns_with_torch_alone() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60
    done = run(f"import runpy; runpy.run_path({str(EXAMPLE)!r})")
    assert done.returncode == 0, done.stderr
    success = [float(value) for value in re.findall(r"success ([0-9.]+)", done.stdout)]
    assert len(success) == 5
    assert success[-1] > 0.9


def test_the_command_says_what_to_install() -> None:
    done = run("import runpy; sys.argv = ['epo']; runpy.run_module('epo', run_name='__main__')")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install -e '.[train]'" in done.stderr


def test_an_import_that_is_missing_in_our_own_code_is_not_hidden() -> None:
    done = run("sys.modules['epo.cli'] = None; import runpy; runpy.run_module('epo', run_name='__main__')")
    assert done.returncode == 1
    assert "epo.cli" in done.stderr
