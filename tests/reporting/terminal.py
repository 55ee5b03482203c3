"""A real terminal for tests: a pseudo-terminal on one side, an emulator that keeps its screen on the other."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyte


@dataclass(slots=True)
class Terminal:
    """What a program left behind in a terminal."""

    screen: pyte.HistoryScreen
    raw: bytes = b""
    snapshots: list[list[str]] = field(default_factory=list[list[str]])
    """The screen at every `pause` of the program."""
    code: int | None = None

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    def everything(self) -> list[str]:
        """What scrolled away, and then the screen."""
        width = self.screen.columns
        past = ["".join(line[x].data for x in range(width)).rstrip() for line in self.screen.history.top]
        return past + self.lines()


def run_in_terminal(
    program: Callable[[Callable[[], None]], None] | Sequence[str],
    *,
    columns: int = 80,
    rows: int = 24,
    environment: Mapping[str, str] | None = None,
    at_pause: Sequence[Callable[[Terminal, int], None]] = (),
    watch: Callable[[Terminal, int], None] | None = None,
    seconds: float = 120,
) -> Terminal:
    """Run a function, in a fork of this process, or a command in a terminal of that size.

    Args:
        program: a function gets `pause`, which returns when the emulator has read everything so far.
        at_pause: what happens at the first, second, ... pause; gets the terminal and the descriptor of its keyboard.
        watch: called after everything that is read.
    """
    ready_read, ready_write = os.pipe()
    go_read, go_write = os.pipe()
    process, keyboard = pty.fork()
    if process == 0:
        _child(program, columns, rows, environment or {}, lambda: (os.write(ready_write, b"x"), os.read(go_read, 1)))
    terminal = Terminal(pyte.HistoryScreen(columns, rows, history=5000, ratio=0.5))
    stream = pyte.ByteStream(terminal.screen)
    actions, deadline = list(at_pause), time.monotonic() + seconds

    def read(wait: float) -> bool | None:
        """Whether something came; None at the end."""
        if not select.select([keyboard], [], [], wait)[0]:
            return False
        try:
            data = os.read(keyboard, 65536)
        except OSError:  # Linux says so when the other side is closed
            return None
        terminal.raw += data
        stream.feed(data)
        if data and watch is not None:
            watch(terminal, keyboard)
        return True if data else None

    try:
        while (got := read(0.05)) is not None:
            assert time.monotonic() < deadline, terminal.lines()
            if got or not select.select([ready_read], [], [], 0)[0]:
                continue
            os.read(ready_read, 1)
            while read(0.05):
                pass
            terminal.snapshots.append(terminal.lines())
            if actions:
                actions.pop(0)(terminal, keyboard)
            os.write(go_write, b"x")
    except BaseException:
        os.kill(process, 9)
        raise
    finally:
        for descriptor in (ready_read, ready_write, go_read, go_write, keyboard):
            os.close(descriptor)
        terminal.code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return terminal


def resize(terminal: Terminal, keyboard: int, *, columns: int, rows: int) -> None:
    """What a window manager does to both sides."""
    fcntl.ioctl(keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    terminal.screen.resize(rows, columns)


def _child(
    program: Callable[[Callable[[], None]], None] | Sequence[str],
    columns: int,
    rows: int,
    environment: Mapping[str, str],
    pause: Callable[[], object],
) -> None:
    code = 70
    try:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            os.environ.pop(name, None)
        os.environ.update({"TERM": "xterm-256color", **environment})
        if not callable(program):
            os.execvp(program[0], list(program))
        # The test runner has replaced these by files of its own.
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(os.dup(n), m) for n, m in ((0, "r"), (1, "w"), (2, "w")))
        program(lambda: pause() and None)
        sys.stderr.flush()
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\r\n".encode(errors="replace"))
    finally:
        os._exit(code)
