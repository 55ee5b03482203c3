"""A vLLM engine in a process of its own, as seen from this one: started, asked, ended."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

from epo.errors import UserError

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}
# The engine's core beside its front end, so that one process is all there is to hand weights to and to end.
_IN_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
ANSWER_SECONDS = 3600.0
"""After which an engine that says nothing counts as stuck. A round of drawing is one message, and may honestly take
many minutes on a slow machine; so may the start with a large model."""


class EngineDied(RuntimeError):
    """The engine's process is gone."""


class EngineStuck(EngineDied):
    """The engine's process gave no answer in time, and was ended for it."""


class EngineRefused(RuntimeError):
    """The engine answered with an error."""


def require_vllm() -> None:
    """
    Raises:
        UserError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "sampler.name='vllm' needs the package vllm, which is not installed: on a GPU pip install "
            "-e '.[vllm]', on a CPU see docs/vllm.md; or set sampler.name=local"
        )


class Engine:
    """One engine process and the folder in which files are handed over.

    The two talk JSON over a pair of connected sockets that nobody else can reach. The process leads a session of its
    own, so that Ctrl-C at the terminal does not reach it, and ends when its socket closes, whatever ended this process.

    Args:
        model_config: what goes into the `config.json` of the model.
        settings: keyword arguments of `vllm.LLM`.
        environment: variables set for the process, besides those that keep it offline.

    Raises:
        UserError: the engine does not start.
    """

    def __init__(self, *, model_config: dict[str, Any], settings: dict[str, Any], environment: dict[str, str]) -> None:
        require_vllm()
        self._temporary = tempfile.TemporaryDirectory(prefix="epo-vllm-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        (self.folder / "model").mkdir()
        (self.folder / "model" / "config.json").write_text(json.dumps(model_config), encoding="utf-8")
        self._log = self.folder / "engine.log"
        ours, theirs = socket.socketpair()
        with theirs, open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                # -P: nothing of the working directory is imported.
                [sys.executable, "-P", "-m", "epo.sampling._vllm_worker", str(theirs.fileno()), str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_OFFLINE, **_IN_ONE_PROCESS, **environment},
                start_new_session=True,
            )
        self._socket, self._answers = ours, ours.makefile("r", encoding="utf-8")
        self._end = weakref.finalize(self, _end, ours, self._process)
        try:
            self.call("start", model=str(self.folder / "model"), **settings)
        except (EngineDied, EngineRefused) as error:
            advice = self._advice(str(error))
            self.close()
            raise UserError(f"sampler.name='vllm': the engine does not start ({error}): {advice}") from None

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, do: str, **fields: Any) -> dict[str, Any]:
        """Send a message and wait for its answer.

        Raises:
            EngineDied: before it answered.
            EngineStuck: it gave no answer within `ANSWER_SECONDS`; its process is gone, too.
            EngineRefused: it answered with an error.
        """
        self._socket.settimeout(ANSWER_SECONDS)
        try:
            self._socket.sendall(json.dumps({"do": do, **fields}).encode() + b"\n")
            line = self._answers.readline()
        except TimeoutError:
            self._process.kill()
            self._end()
            raise EngineStuck(f"no answer to {do!r} within {ANSWER_SECONDS:g} s, so its process was ended") from None
        except OSError:
            line = ""
        if not line:
            raise EngineDied(self._cause_of_death())
        answer = json.loads(line)
        if "error" in answer:
            raise EngineRefused(" ".join(str(answer["error"]).split())[:400])
        return answer

    def close(self) -> None:
        """End the process and remove the folder. More than once is no error."""
        self._end()
        self._temporary.cleanup()

    def _cause_of_death(self) -> str:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "its process closed the connection"
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
        return f"its process ended with code {code}: {last[-300:]}"

    def _advice(self, reason: str) -> str:
        log = self._log.read_text(encoding="utf-8", errors="replace")
        if "torchvision" in reason or "torchvision::nms" in log:
            return "the installed torchvision does not fit torch: pip uninstall torchvision torchaudio torchcodec"
        if "block_size" in reason or "block size" in reason:
            return "set sampler.block_size to a multiple of 32"
        if any(word in reason.lower() for word in ("kv cache", "memory", "sigkill")):
            return (
                "lower sampler.kv_gib where memory is short, raise it (or lower model.max_context) where keys and "
                "values do not fit"
            )
        return "docs/vllm.md says what it needs; sampler.name=local needs no engine"


def _end(connection: socket.socket, process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):  # already gone
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    with contextlib.suppress(ProcessLookupError):  # the leader of the group was killed, not what it had started
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
