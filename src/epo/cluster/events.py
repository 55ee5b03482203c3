"""Who was lost, and what was done about it: for the person who watches, and in the run folder's `cluster.jsonl`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class EventLog:
    """Args:
    note: is told every event in a line.
    """

    def __init__(self, file: Path, note: Callable[[str], None]) -> None:
        self._file, self._note = file, note

    def add(self, text: str, **details: Any) -> None:
        """Say what happened, and append it with the details that programs want."""
        with self._file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"time": round(time.time(), 3), "text": text, **details}) + "\n")
        self._note(text)
