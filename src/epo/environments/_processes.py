"""The process table: which processes live in a session, and what memory they hold. Empty where there is no /proc."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

MAX_AGE_SECONDS = 1.0
"""How long one look at the process table serves; a look takes milliseconds."""


class ProcessInfo(NamedTuple):
    """A line of the process table."""

    pid: int
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
                table.append(ProcessInfo(int(pid), int(fields[3]), int(fields[21]) * page))
    return table


class SessionMemory:
    """Resident memory by session, looked up at most every `MAX_AGE_SECONDS`."""

    def __init__(self) -> None:
        self._bytes: Counter[int] = Counter()
        self._looked_at = float("-inf")

    def of(self, session: int) -> int:
        """Bytes that all processes of a session hold together; 0 for an unknown one."""
        if time.monotonic() - self._looked_at >= MAX_AGE_SECONDS:
            self.look()
        return self._bytes[session]

    def look(self) -> bool:
        """Read the process table anew. False where there is none."""
        table = process_table()
        self._bytes = Counter()
        for process in table:
            self._bytes[process.session] += process.rss_bytes
        self._looked_at = time.monotonic()
        return bool(table)
