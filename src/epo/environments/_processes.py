"""The process table: which processes belong to a worker, and what memory they hold. Empty where there is no /proc."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import NamedTuple

MAX_AGE_SECONDS = 1.0
"""How long one look at the process table serves; a look takes milliseconds."""


class ProcessInfo(NamedTuple):
    """A line of the process table."""

    pid: int
    parent: int
    session: int
    rss_bytes: int


def process_table() -> list[ProcessInfo]:
    """All living processes that this one may see."""
    page, table = os.sysconf("SC_PAGE_SIZE"), list[ProcessInfo]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            pid, _, rest = stat.read_text(errors="replace").partition(" (")
            fields = rest.rpartition(") ")[2].split()  # the name before it may hold anything
            if fields[0] not in "ZX":
                table.append(ProcessInfo(int(pid), int(fields[1]), int(fields[3]), int(fields[21]) * page))
    return table


def resident_bytes() -> int | None:
    """Memory that this process holds; None where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def family(leader: int, table: list[ProcessInfo]) -> list[ProcessInfo]:
    """The processes of the leader's session, and what descends from them in sessions of its own: servers of the Model
    Context Protocol are started so."""
    members = {process.pid for process in table if process.session == leader}
    grown = True
    while grown:
        offspring = {process.pid for process in table if process.parent in members} - members
        members |= offspring
        grown = bool(offspring)
    return [process for process in table if process.pid in members]


class SessionMemory:
    """Resident memory by worker, looked up at most every `MAX_AGE_SECONDS`."""

    def __init__(self) -> None:
        self._table: list[ProcessInfo] = []
        self._looked_at = float("-inf")

    def of(self, leader: int) -> int:
        """Bytes that a worker and all its descendants hold together; 0 for an unknown one."""
        if time.monotonic() - self._looked_at >= MAX_AGE_SECONDS:
            self.look()
        return sum(process.rss_bytes for process in family(leader, self._table))

    def look(self) -> bool:
        """Read the process table anew. False where there is none."""
        self._table = process_table()
        self._looked_at = time.monotonic()
        return bool(self._table)
