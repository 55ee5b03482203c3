"""Who was lost, and what was done about it: for the person who watches, and in the run folder's `cluster.jsonl`."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class EventLog:
    """Args:
    note: is told every event in a line, from the thread that calls `tell`.
    """

    def __init__(self, file: Path, note: Callable[[str], None]) -> None:
        self._file, self._note = file, note
        self._untold: queue.SimpleQueue[str] = queue.SimpleQueue()

    def add(self, text: str, **details: Any) -> None:
        """Append what happened, with the details that programs want. From any thread."""
        line = json.dumps({"time": round(time.time(), 3), "text": text, **details}) + "\n"
        with self._file.open("a", encoding="utf-8") as handle:
            handle.write(line)  # one write, which others do not come between
        self._untold.put(text)

    @property
    def has_untold(self) -> bool:
        return not self._untold.empty()

    def tell(self) -> None:
        """Say what was not said yet."""
        while self.has_untold:
            self._note(self._untold.get())
