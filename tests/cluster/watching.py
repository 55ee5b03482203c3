"""An observer that keeps what it hears and acts on it, and the processes that it may act on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from epo.evaluation.panels import PanelResult


class Watcher:
    """Args: `on_advance` is called with the stage and the number of its units that are done."""

    def __init__(self, on_advance: Callable[[str, int], None] | None = None) -> None:
        self._on_advance = on_advance
        self._stage = ""
        self.notes: list[str] = []
        self.steps: list[dict[str, float]] = []

    def begin(self, what: str, total: int) -> None:
        self._stage = what

    def advance(self, done: int, note: str = "") -> None:
        if self._on_advance is not None:
            self._on_advance(self._stage, done)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(metrics)

    def evaluated(self, step: int, results: Sequence[PanelResult]) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


def processes(title: str) -> list[int]:
    """Ids of the living processes that descend from this one and that Ray calls `title`."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(") ")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue

    def is_ours(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return sorted(pid for pid, found in titles.items() if found.startswith(f"ray::{title}") and is_ours(pid))
