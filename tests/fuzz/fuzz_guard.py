"""What may not happen while hostile input is handled: a hang, a program, a write elsewhere, a connection."""

from __future__ import annotations

import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "pty.spawn",
    "subprocess.Popen",
    "socket.connect",
    "socket.bind",
    "pickle.find_class",
    "webbrowser.open",
)

_watching: list[list[str]] = []
_writable: list[Path] = []


class Hang(BaseException):
    """Not an Exception, so that no handler of the code under test takes it for its own."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event in _FORBIDDEN:
        _watching[-1].append(f"{event}{arguments!r}"[:200])
    if event == "open" and isinstance(arguments[0], str | bytes) and isinstance(arguments[1], str):
        if not set(arguments[1]) & set("wxa+"):
            return
        path = Path(
            arguments[0].decode("utf-8", "surrogateescape") if isinstance(arguments[0], bytes) else arguments[0]
        )
        if not any(path.absolute().is_relative_to(folder) for folder in (*_writable, Path("/dev"))):
            _watching[-1].append(f"written: {path}"[:200])


_installed = False


@contextmanager
def contained(*, folder: Path, seconds: float, has_workers: bool = False) -> Iterator[None]:
    """Watches a block of code.

    With `has_workers` environments have processes and temporary files, which are started, spoken to on this machine,
    and made.

    Raises:
        Hang: after `seconds`.
        AssertionError: the block started a program, opened a connection, unpickled something, or opened a file outside
            `folder` for writing.
    """
    global _installed
    if not _installed:
        sys.addaudithook(_audit)  # there is no way to take one away again
        _installed = True

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"no answer within {seconds} s")

    seen: list[str] = []
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _watching.append(seen)
    _writable.append(folder.absolute())
    try:
        yield
    finally:
        _watching.pop()
        _writable.pop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if has_workers:
        allowed = ("subprocess.Popen", "pickle.find_class", f"written: {tempfile.gettempdir()}")
        seen = [e for e in seen if not e.startswith(allowed) and not ("socket.connect" in e and "'127.0.0.1'" in e)]
    assert not seen, f"hostile input reached {seen}"


@contextmanager
def bounded_memory(gib: int) -> Iterator[None]:
    """Reading what never ends becomes a `MemoryError`, not the end of the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (gib << 30, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
