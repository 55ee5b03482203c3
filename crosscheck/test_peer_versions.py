"""The figures in docs/crosscheck.md hold for these versions."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

PINS = dict(
    line.split("==")
    for line in Path(__file__).parents[1].joinpath("requirements/crosscheck.txt").read_text().splitlines()
    if "==" in line
)


@pytest.mark.parametrize("package", ["torch", "trl", "verl", "transformers", "numpy", "tensordict"])
def test_the_installed_version_is_the_pinned_one(package: str) -> None:
    assert version(package).split("+")[0] == PINS[package]
