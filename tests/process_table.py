"""Living processes, and where they accept connections, as /proc has it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def children() -> dict[int, list[tuple[int, str]]]:
    """Living processes and their command names, by parent."""
    found: dict[int, list[tuple[int, str]]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = stat.read_text(errors="replace").partition(" (")
        except OSError:
            continue
        command, _, fields = rest.rpartition(") ")
        state, parent = fields.split()[:2]
        if state not in "ZX":
            found.setdefault(int(parent), []).append((int(pid), command))
    return found


def descendants(pid: int) -> dict[int, str]:
    table, found, waiting = children(), dict[int, str](), [pid]
    while waiting:
        for child, command in table.get(waiting.pop(), ()):
            found[child] = command
            waiting.append(child)
    return found


def alive(pids: dict[int, str]) -> list[int]:
    now = {pid for siblings in children().values() for pid, _ in siblings}
    return sorted(pid for pid in pids if pid in now)


def listening(pids: dict[int, str]) -> set[str]:
    """Local addresses, as /proc writes them, at which any of the processes accepts connections."""
    sockets: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            sockets |= {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    return {
        columns[1].rpartition(":")[0]
        for table in ("tcp", "tcp6", "udp", "udp6")
        for columns in map(str.split, Path(f"/proc/net/{table}").read_text().splitlines()[1:])
        if columns[3] in ("0A", "07") and f"socket:[{columns[9]}]" in sockets
    }


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
