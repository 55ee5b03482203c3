"""Real servers for the adapters that talk to one: OpenEnv and MCP, on loopback, ended by the test."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DRAWERS = ("left", "right", "top")


def openenv_python() -> str | None:
    """An interpreter that has OpenEnv's server: this one, or that of `make test-adapters`, or `$OPENENV_PYTHON`."""
    if importlib.util.find_spec("openenv"):
        return sys.executable
    named = os.environ.get("OPENENV_PYTHON", str(HERE.parents[1] / ".venv-openenv" / "bin" / "python"))
    return named if Path(named).is_file() else None


@contextlib.contextmanager
def serving(*command: str) -> Iterator[int]:
    """A server that prints its port when it is ready."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


@contextlib.contextmanager
def dial(*, sessions: int = 8) -> Iterator[dict[str, Any]]:
    """The dial game on a real OpenEnv server; yields the suite's options."""
    python = openenv_python()
    assert python is not None
    with serving(python, str(HERE / "openenv_game.py"), str(sessions)) as port:
        yield {
            "url": f"http://127.0.0.1:{port}",
            "goal": "Turn the dial to {note.number} and open the safe.",
            "observation": "{text}",
            "actions_field": "legal",
            "success_field": "opened",
            "train": 8,
            "iid": 4,
            "ood": 4,
            "ood_options": {"places": 9},
        }


def drawers(folder: Path, **options: Any) -> dict[str, Any]:
    """The drawers on a real MCP server, with a file of tasks in `folder`; returns the suite's options."""
    lines: list[dict[str, Any]] = []
    for split, things in {"train": ("key", "ring", "coin"), "iid": ("lamp",), "ood": ("old iron key",)}.items():
        for thing in things:
            for number, drawer in enumerate(DRAWERS):
                place = {"thing": thing, "drawer": drawer}
                lines.append(
                    {
                        "id": f"{thing}-{drawer}".replace(" ", "-"),
                        "split": split,
                        "kind": "put",
                        "goal": f"Put the {thing} into the {drawer} drawer.",
                        "setup": [{"tool": "put", "arguments": {**place, "drawer": DRAWERS[number - 1]}}],
                        "check": {"tool": "is_in", "arguments": place},
                        "demonstration": [{"tool": "put", "arguments": place}],
                    }
                )
    path = folder / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return {
        "tasks": str(path),
        "command": [sys.executable, str(HERE / "mcp_drawers.py")],
        "tools": ["put", "look", "where"],
        "reset_tool": "empty",
        **options,
    }
