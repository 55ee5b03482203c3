"""Writes what of docs/ is made from the code and the kept runs: `python docs/generate.py`, a part of `make docs`."""

from __future__ import annotations

import runpy
from pathlib import Path

PROGRAMS = ("configuration_page.py", "command_page.py", "figures.py")


def main() -> None:
    for name in PROGRAMS:
        runpy.run_path(str(Path(__file__).parent / "tools" / name), run_name="__main__")


if __name__ == "__main__":
    main()
