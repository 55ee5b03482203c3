"""An OpenAI-compatible server on loopback that says what it is told to, faults included."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self


class Raw(NamedTuple):
    """An answer as it goes over the wire."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}


class Cut:
    """No answer: the connection is reset, after half of one."""


class Silence:
    """No answer until the server is stopped."""


Answer = dict[str, Any] | Raw | Cut | Silence


def says(text: str | None, *, finish: str | None = "stop", usage: Any = None) -> dict[str, Any]:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"object": "chat.completion", "choices": [choice]} | ({} if usage is None else {"usage": usage})


def refuses(status: int, message: str = "no", *, headers: Mapping[str, str] | None = None, **error: Any) -> Raw:
    """An error as OpenAI writes it."""
    return Raw(status, json.dumps({"error": {"message": message, **error}}).encode(), headers or {})


class ChatStub:
    """`answer(body, number)` answers request `number`, from 0; calls come from several threads."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Answer]) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.most = 0
        """Requests that were open at once."""
        self._open = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # head and body in one packet

            def do_POST(self) -> None:
                if stub._stopped.is_set():
                    self.close_connection = True
                    return
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub._lock:
                    number = len(stub.bodies)
                    stub.bodies.append(body)
                    stub.headers.append({name.lower(): value for name, value in self.headers.items()})
                    stub.paths.append(self.path)
                    stub._open += 1
                    stub.most = max(stub.most, stub._open)
                try:
                    self.reply(stub.answer(body, number))
                finally:
                    with stub._lock:
                        stub._open -= 1

            def reply(self, answer: Answer) -> None:
                if isinstance(answer, Silence):
                    stub._stopped.wait(60)
                    self.close_connection = True
                    return
                if isinstance(answer, Cut):
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.wfile.flush()
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                    return
                raw = answer if isinstance(answer, Raw) else Raw(200, json.dumps(answer).encode())
                self.send_response(raw.status)
                for key, value in {**raw.headers, "Content-Length": str(len(raw.body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(raw.body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """Whoever asked has gone."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Nobody listens any more. More than once is no error."""
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
