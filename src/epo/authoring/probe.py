"""One environment in a worker process of its own, as training runs it, called one method at a time.

Unlike the pool a probe repeats nothing and hides nothing: an exception comes back as what it is, and so do a death and
a missed deadline.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from epo.environments._processes import family, process_table
from epo.environments._worker import Answer, Lost, Request, Worker
from epo.environments.registry import resolve_suite
from epo.types import Task


class Misconduct(Exception):
    """The environment did what the contract forbids; the message says what, in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What came of one call."""

    value: Any = None
    error: str | None = None
    """`Type: message` of the exception that the environment raised."""
    seconds: float = 0.0


class Usage(NamedTuple):
    """What a worker holds. Bytes are resident memory."""

    own_bytes: int
    descendants_bytes: int
    processes: int
    descriptors: int
    """Open file descriptors of the worker and of its descendants."""


class Probe:
    """A worker process that is started when it is needed, and again after it died.

    Args:
        suite_name: as for `make_suite`.
        options: the suite's options, plain data.
        seconds: deadline of every call, and of the start of the process.
    """

    def __init__(self, suite_name: str, options: Mapping[str, Any], *, seconds: float) -> None:
        self._name, self._target, self._options = suite_name, resolve_suite(suite_name), dict(options)
        self._seconds = seconds
        self._worker: Worker | None = None

    def call(self, method: Literal["reset", "step", "demonstration"], argument: Task | str) -> Reply:
        """Call a method of the environment.

        Raises:
            Misconduct: the process died, gave no answer in time, or could not build the environment.
        """
        if self._worker is None:
            self._worker = Worker(self._name, self._target, self._options, send_seconds=self._seconds)
            answer, words = self._receive("start")
            if answer is not Answer.READY:
                self.close()
                raise Misconduct(f"make_env: {words}")
        began = time.perf_counter()
        with contextlib.suppress(OSError):  # it is gone: `_receive` says how
            self._worker.send(Request(method, argument))
        answer, value = self._receive(method)
        seconds = time.perf_counter() - began
        if answer is Answer.VALUE:
            return Reply(value=value, seconds=seconds)
        return Reply(error=f"UserError: {value}" if answer is Answer.USER_ERROR else value, seconds=seconds)

    def usage(self) -> Usage | None:
        """What the worker holds; None without a worker, and where there is no /proc."""
        leader = self._worker.pid if self._worker else None
        processes = family(leader, process_table()) if leader is not None else []
        if not processes:
            return None
        descriptors = 0
        for process in processes:
            with contextlib.suppress(OSError):  # it ended meanwhile
                descriptors += len(os.listdir(Path("/proc") / str(process.pid) / "fd"))
        own = sum(process.rss_bytes for process in processes if process.pid == leader)
        total = sum(process.rss_bytes for process in processes)
        return Usage(own, total - own, len(processes), descriptors)

    def close(self) -> None:
        """End the process. Safe to call twice."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self, what: str) -> tuple[Answer, Any]:
        assert self._worker is not None
        deadline = time.monotonic() + self._seconds
        try:
            while True:
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([self._worker.socket], [], [], left)[0]:
                    self.close()
                    raise Misconduct(f"{what}: no answer within {self._seconds:g} s")
                answer = self._worker.receive()
                if answer is not None:
                    return answer
        except Lost:
            how, words = self._worker.kill()
            self._worker = None
            raise Misconduct(f"{what}: the process died: {how}{_last_words(words)}") from None


def _last_words(stderr: str) -> str:
    """The line that matters: what `faulthandler` says of a crash, else the last one."""
    lines = stderr.splitlines()
    fatal = [line for line in lines if line.startswith("Fatal Python error")]
    return f": {(fatal or lines)[-1]}" if lines else ""
