"""A worker process that owns one environment, seen from both sides: `main` runs in it, `Worker` is the parent's handle.

They talk over a socket pair in length-prefixed pickles of our own records. Exceptions travel as text, so that a class
the parent lacks cannot break it. The process is a plain `python -c`, not a fork and not `multiprocessing`: it imports
neither the parent's main script nor torch, and it leads a session of its own, so that Ctrl-C at the terminal does not
reach it and everything it starts, a JVM for instance, can be found and killed with it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import logging
import os
import pickle
import queue
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, NamedTuple

from epo.environments._processes import family, process_table
from epo.environments._replies import checked
from epo.environments.base import TextEnv
from epo.environments.registry import load_suite
from epo.errors import UserError
from epo.types import Observation, Step, Task

_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from epo.environments._worker import main
main(int(sys.argv[2]), sys.argv[3])
"""
_LENGTH = struct.Struct("!Q")
MAX_ANSWER_BYTES = 1 << 24
"""Of one answer of an environment. The longest of the suites here, a list of 500 actions, has some 30,000."""
_LAST_WORDS = 2000  # bytes of a dead worker's stderr that go into the log
_DEATH_SECONDS = 5.0  # what the kernel gets to end a killed process

logger = logging.getLogger(__name__)


class Request(NamedTuple):
    """One call of an environment's method."""

    method: Literal["reset", "step", "demonstration"]
    argument: Task | str


class Answer(Enum):
    READY = "the environment is built"
    VALUE = "what the method returned"
    USER_ERROR = "the text of a UserError"
    FAILURE = "the type and text of any other exception"
    NONSENSE = "what is wrong with what the method returned"


class _RecordsOnly(pickle.Unpickler):
    """Reads what workers say: our records and plain data, and nothing that could be called."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in _RECORDS:
            return getattr(sys.modules[module_name], global_name)
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is no record of an environment's")


_RECORDS = frozenset((kind.__module__, kind.__name__) for kind in (Answer, Observation, Step))


class Lost(ConnectionError):
    """The worker process is gone."""


class Worker:
    """The parent's end of one worker process. Starting returns at once; `Answer.READY` comes when it can work.

    Args:
        suite_name, target, options: what `load_suite` needs to build the suite in the process.
        send_seconds: how long `send` may block before the process counts as hung.
    """

    def __init__(self, suite_name: str, target: str, options: Mapping[str, Any], *, send_seconds: float) -> None:
        self.socket, theirs = socket.socketpair()  # ours is readable when there is something to `receive`
        self.socket.settimeout(send_seconds)
        self._buffer = bytearray()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        # Its own, so that nothing an engine was writing there when it was killed is left behind.
        self._scratch = tempfile.mkdtemp(prefix="epo-worker-")
        environ = os.environ | {
            "TMPDIR": self._scratch,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",  # so that an environment that iterates over a set does it alike in every worker
        }
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-c",
                        _BOOT,
                        json.dumps([*map(str, sys.path)]),
                        str(theirs.fileno()),
                        self._scratch,
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    env=environ,
                )
        except OSError:
            self._clear()
            raise
        with contextlib.suppress(OSError):  # it died already: the next `receive` says so
            self.send((suite_name, target, dict(options)))

    @property
    def pid(self) -> int:
        """Process id, and id of the session that holds all its descendants."""
        return self._process.pid

    def send(self, message: Any) -> None:
        """Send a `Request`, or None to ask the process to end.

        Raises:
            OSError: it is gone, or does not read (TimeoutError).
        """
        data = pickle.dumps(message)
        self.socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> tuple[Answer, Any] | None:
        """Take what has arrived, without waiting for more: a whole answer, or None as long as it is incomplete.

        Raises:
            Lost: the process is gone.
        """
        try:
            data = self.socket.recv(1 << 20, socket.MSG_DONTWAIT)
        except OSError as error:
            raise Lost(str(error)) from error
        if not data:
            raise Lost("the process ended")
        self._buffer += data
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > MAX_ANSWER_BYTES:
            raise Lost(f"the process announced an answer of {length} bytes")
        if len(self._buffer) < _LENGTH.size + length:
            return None
        try:
            answer = _RecordsOnly(io.BytesIO(self._buffer[_LENGTH.size : _LENGTH.size + length])).load()
        except Exception as error:  # whatever bytes can do to pickle
            raise Lost(f"the process said what is no answer ({error})") from error
        del self._buffer[: _LENGTH.size + length]
        return answer

    def kill(self) -> tuple[str, str]:
        """End the process and all its descendants now. Returns how it died, and the last it wrote to stderr."""
        # All this before the leader is waited for: until then its id cannot belong to anyone else. Descendants in
        # sessions of their own are found by their parents, so they come before it; it is stopped meanwhile, and so
        # neither starts others nor remarks on their end.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, signal.SIGSTOP)
        _kill_descendants(self.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS denies signals to a dead group
            os.killpg(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + _DEATH_SECONDS
        while (left := _kill_descendants(self.pid)) and time.monotonic() < deadline:
            time.sleep(0.01)
        if left:
            logger.error("processes %s of environment worker %d survive SIGKILL", left, self.pid)
        code = self._process.wait()
        size = os.fstat(self._stderr.fileno()).st_size
        words = (
            os.pread(self._stderr.fileno(), _LAST_WORDS, max(0, size - _LAST_WORDS)).decode(errors="replace").strip()
        )
        self._clear()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}", words

    def _clear(self) -> None:
        self.socket.close()
        self._stderr.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def _kill_descendants(leader: int) -> list[int]:
    """Kill what lives in the leader's session or descends from it, but the leader. Returns whom it killed."""
    pids = [process.pid for process in family(leader, process_table()) if process.pid != leader]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids


def main(fd: int, scratch: str) -> None:
    """Build the environment, then answer requests until told to end. Runs in the worker process only.

    Args:
        fd: the connection to the parent.
        scratch: the process's own temporary folder, which the parent removes, or, if that died first, this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    os.set_inheritable(fd, False)  # or a JVM would hold the connection open after this process died
    connection = socket.socket(fileno=fd)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox, scratch), daemon=True).start()

    name, target, options = inbox.get()
    try:
        env = load_suite(name, target, options).make_env()
    except Exception as error:
        _send(connection, _explain(error))
        return
    _send(connection, (Answer.READY, None))
    with env:
        while (request := inbox.get()) is not None:
            try:
                value = _call(env, request)
                try:
                    answer = (Answer.VALUE, checked(request, value))
                except TypeError as error:
                    answer = (Answer.NONSENSE, str(error))
            except Exception as error:
                answer = _explain(error)
            _send(connection, answer)


def _listen(connection: socket.socket, inbox: queue.SimpleQueue[Any], scratch: str) -> None:
    """Receive in a thread of its own, so that a parent's death is noticed while the environment is busy or hangs."""
    stream = connection.makefile("rb")
    try:
        while True:
            (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
            inbox.put(pickle.loads(stream.read(length)))
    except (OSError, EOFError, struct.error):
        _kill_descendants(os.getpid())
        shutil.rmtree(scratch, ignore_errors=True)
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _call(env: TextEnv, request: Request) -> Any:
    method, argument = request
    return getattr(env, method)(argument)


def _send(connection: socket.socket, message: tuple[Answer, Any]) -> None:
    data = pickle.dumps(message)
    if len(data) > MAX_ANSWER_BYTES:
        text = f"it answered with {len(data)} bytes; at most {MAX_ANSWER_BYTES} are taken"
        data = pickle.dumps((Answer.NONSENSE, text))
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _explain(error: Exception) -> tuple[Answer, str]:
    if isinstance(error, UserError):
        return Answer.USER_ERROR, str(error)
    traceback.print_exception(error)  # to the file whose end `Worker.kill` returns
    return Answer.FAILURE, f"{type(error).__name__}: {error}"
