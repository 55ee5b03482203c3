"""A JSON-lines file that somebody else writes: each reading parses only what is new."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

_TAIL = 256
"""Bytes before the reading position that are compared at the next reading."""


class JsonLines:
    """Follows `file`, which may not exist yet, grows, ends within a line, or is replaced by another.

    A file is another one if its inode is, if it is shorter than what was read of it, or if the bytes before the reading
    position have changed.

    Example:
        >>> lines = JsonLines(run / "metrics.jsonl")
        >>> entries, replaced = lines.read()
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.damaged = 0
        """Complete lines that are no JSON object."""
        self._restart()

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The objects on complete lines since the last reading, and whether the file was replaced in between.

        After a replacement the lines are those of the new file, from its start.
        """
        if not self.file.is_file():
            replaced = self._position > 0
            self._restart()
            return [], replaced
        with self.file.open("rb") as handle:
            # Of the handle, not of the path, which may name another file by now.
            stat = os.fstat(handle.fileno())
            identity = (stat.st_dev, stat.st_ino)
            if (*identity, stat.st_size, stat.st_mtime_ns) == self._seen:
                return [], False
            self._seen = (*identity, stat.st_size, stat.st_mtime_ns)
            replaced = False
            if self._position:
                handle.seek(self._position - len(self._tail))
                same = identity == self._identity and handle.read(len(self._tail)) == self._tail
                if not same:
                    replaced = True
                    self._restart()
            self._identity = identity
            handle.seek(self._position)
            content = handle.read()
        complete = content[: content.rfind(b"\n") + 1]
        self._position += len(complete)
        self._tail = (self._tail + complete)[-_TAIL:]
        return self._parse(complete), replaced

    def _restart(self) -> None:
        self.damaged = 0
        self._position = 0
        self._tail = b""
        self._identity: tuple[int, int] | None = None
        self._seen: tuple[int, ...] | None = None

    def _parse(self, content: bytes) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for line in content.split(b"\n"):
            if not line.strip():
                continue
            entry = parse_object(line)
            if entry is None:
                self.damaged += 1
            else:
                found.append(entry)
        return found


def parse_object(text: bytes | str) -> dict[str, Any] | None:
    """The JSON object that `text` is, or None. NaN and infinity, which are no JSON, become null."""
    try:
        entry = json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", entry) if isinstance(entry, dict) else None
