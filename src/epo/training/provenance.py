"""What decides a run's outcome besides its configuration, as provenance.json records it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from epo.environments.base import TaskSuite


def provenance(suite: TaskSuite) -> dict[str, Any]:
    """Versions, commit, data, machine."""
    packages: dict[str, str | None] = {}
    for name in ("epo-agents", "torch", "transformers", "tokenizers", "safetensors", "peft", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "packages": packages,
        "python": platform.python_version(),
        "commit": commit_of_code(),
        "suite": {"name": suite.name, **suite.provenance()},
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "command": ["epo" if Path(sys.argv[0]).name == "__main__.py" else Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def commit_of_code() -> str | None:
    """The commit that is checked out where this package is; None outside a repository."""
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
