"""`epo env new`: a small package that works, to be changed into one's own environment."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path
from string import Template

from epo.environments.registry import resolve_suite, suite_names
from epo.errors import UserError

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_FILES = {
    "pyproject.toml": "pyproject.toml.tmpl",
    "README.md": "README.md.tmpl",
    "recipe.yaml": "recipe.yaml.tmpl",
    "src/{name}/__init__.py": "__init__.py.tmpl",
    "src/{name}/suite.py": "suite.py.tmpl",
    "tests/test_{name}.py": "test_suite.py.tmpl",
}


def write_package(name: str, path: Path | None = None) -> Path:
    """Write the package of a new suite called `name` into the folder `path`, by default `./name`. All or nothing.

    Raises:
        UserError: a name that cannot be a module's or is taken, a folder that exists, or one that cannot be written.
    """
    _check_name(name)
    folder = Path(name) if path is None else path
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{str(folder)!r} exists already; choose another name, or another folder with --path")
    words = {
        "name": name,
        "class_name": "".join(part.capitalize() for part in name.split("_")),
        "distribution": name.strip("_").replace("_", "-"),
    }
    templates = resources.files("epo.authoring") / "template"
    try:
        # Beside the destination, so that one rename makes the whole package appear.
        staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.absolute().parent))
    except OSError as error:
        raise UserError(f"cannot write to {str(folder.absolute().parent)!r}: {error.strerror}") from None
    try:
        package = staging / name
        for target, template in _FILES.items():
            file = package / target.format(name=name)
            file.parent.mkdir(parents=True, exist_ok=True)
            text = Template((templates / template).read_text(encoding="utf-8")).substitute(words)
            file.write_text(text, encoding="utf-8")
        os.rename(package, folder)
    except OSError as error:
        raise UserError(f"cannot write {str(folder)!r}: {error.strerror}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise UserError(
            f"name {name!r}: it becomes a Python package, so it must be up to 40 lower-case letters, digits and"
            " underscores, begin with a letter, and be no Python keyword"
        )
    if name in suite_names():
        raise UserError(f"name {name!r}: a suite is called so already ({resolve_suite(name)}); choose another name")
    if name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None:
        raise UserError(f"name {name!r}: a Python package is called so already; choose another name")
