"""A sweep in the terminal: a live table where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from epo.reporting.reading.json_lines import parse_object
from epo.reporting.terminal.text import visible_lines
from epo.sweep.folder import SweepFolder
from epo.sweep.plan import PlannedRun, Sweep

_LIVE_SECONDS = 1.0
_PLAIN_SECONDS = 60.0


class SweepProgress:
    """Says what happens to each run, and where the active ones are.

    Args:
        console: where to; progress belongs on stderr, so that stdout can carry JSON.
    """

    def __init__(self, sweep: Sweep, folder: SweepFolder, console: Console) -> None:
        self._sweep = sweep
        self._folder = folder
        self._console = console
        self._last = time.monotonic()
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def changed(self, run: PlannedRun, what: str) -> None:
        self.note(f"{run.name}: {what}")

    def note(self, text: str) -> None:
        self._console.print(escape(visible_lines(text)), highlight=False, soft_wrap=True)

    def tick(self, active: list[PlannedRun]) -> None:
        now = time.monotonic()
        if now - self._last < (_PLAIN_SECONDS if self._live is None else _LIVE_SECONDS):
            return
        self._last = now
        if self._live is not None:
            self._live.update(state_table(self._sweep, self._folder, active), refresh=True)
            return
        for run in active:
            step, numbers = _where(self._sweep, self._folder, run)
            self.note(f"{run.name}: step {step}  {numbers}".rstrip())


def state_table(sweep: Sweep, folder: SweepFolder, active: Sequence[PlannedRun] = ()) -> Table:
    """Every run of the sweep with its state and newest step."""
    table = Table("run", "state", "step", "newest step")
    for run in sweep.runs():
        step, numbers = _where(sweep, folder, run)
        state = "running" if run in active else folder.state(run).value
        table.add_row(escape(run.name), state, step, numbers)
    return table


def _where(sweep: Sweep, folder: SweepFolder, run: PlannedRun) -> tuple[str, str]:
    newest = _last_line(folder.run(run) / "metrics.jsonl")
    total = sweep.configs[run.arm].steps
    if newest is None:
        return f"-/{total}", ""
    shown = {"success": "success/train", "reward": "reward/mean", "entropy": "entropy/mean"}
    values = {name: newest.get(key) for name, key in shown.items()}
    numbers = [f"{name} {value:.3f}" for name, value in values.items() if isinstance(value, float)]
    return f"{newest['step']}/{total}", "  ".join(numbers)


def _last_line(file: Path) -> dict[str, Any] | None:
    """The last whole line of a metrics file that may be growing; None where that is no line of a step."""
    if not file.is_file():
        return None
    try:
        with file.open("rb") as handle:
            end = handle.seek(0, os.SEEK_END)
            handle.seek(max(0, end - 65536))
            lines = handle.read().split(b"\n")
    except OSError:
        return None
    # What follows the last newline is not whole yet, and what the read began with need not be.
    entry = parse_object(lines[-2]) if len(lines) >= 2 else None
    return entry if entry is not None and type(entry.get("step")) is int else None
