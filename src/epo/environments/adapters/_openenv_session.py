"""One session with an OpenEnv server, in the WebSocket protocol of `openenv.core.env_server.http_server`.

A connection to `/ws` is a session with an environment of its own. Requests are `{"type": "reset" | "step" | "close",
"data": {...}}`; the answer is `{"type": "observation", "data": {"observation": {...}, "reward": ..., "done": ...}}` or
`{"type": "error", "data": {"code": ..., "message": ...}}`. The package's own client would bring its server along, with
web interface and all: some eighty packages.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from epo.environments.adapters._shared import brief, is_loopback, require
from epo.errors import EnvironmentFailure, UserError

_MOST_BYTES = 1 << 24
_CAPACITY_SECONDS = 10.0
"""How long a full server is asked again: it frees the session of a worker that was killed when it notices."""


class Reply(NamedTuple):
    """What the server says after a reset or a step."""

    observation: dict[str, Any]
    reward: float
    """0 where the server gives none."""
    done: bool


class Refusal(NamedTuple):
    """The server does not take an action of that form."""

    words: str


class Session:
    """A connection that is open until `end`, or until anything goes wrong on it.

    Args:
        url: of the server, `http(s)://` or `ws(s)://`.
        seconds: limit for the connection and for every answer.

    Raises:
        EnvironmentFailure: nobody listens there.
        UserError: the package websockets is missing.
    """

    def __init__(self, url: str, *, seconds: float) -> None:
        client = require("websockets.sync.client", extra="openenv")
        self._closed: type[Exception] = require("websockets.exceptions", extra="openenv").ConnectionClosed
        self._url, self._seconds = url, seconds
        self._open = ExitStack()
        parts = urlsplit(url)
        # With an address of its own a connection is not redirected to another host.
        here = (
            {
                "proxy": None,
                "address": (parts.hostname, parts.port or (443 if parts.scheme in ("https", "wss") else 80)),
            }
            if is_loopback(url)
            else {}
        )
        try:
            self._connection = self._open.enter_context(
                client.connect(
                    "ws" + url.rstrip("/").removeprefix("http").removeprefix("ws") + "/ws",
                    open_timeout=seconds,
                    close_timeout=min(seconds, 5.0),
                    max_size=_MOST_BYTES,
                    **here,
                )
            )
        except Exception as error:  # sockets, TLS, handshakes, addresses
            raise EnvironmentFailure(f"no OpenEnv server answers at {url}: {brief(error)}") from error

    def ask(self, kind: str, data: dict[str, Any]) -> Reply | Refusal:
        """Send a request and wait for its answer.

        Raises:
            EnvironmentFailure: the server is lost, too slow, reports an error of its own, or answers nonsense. The
                session is over then: an answer that comes late must not be taken for the next one.
        """
        try:
            # A full server says so at once and closes: then there is an answer to read although nothing was sent.
            with suppress(self._closed):
                self._connection.send(json.dumps({"type": kind, "data": data}))
            text = self._connection.recv(timeout=self._seconds)
        except TimeoutError:
            self.end()
            raise EnvironmentFailure(f"{self._url} gave no answer to {kind} within {self._seconds:g} s") from None
        except Exception as error:
            self.end()
            raise EnvironmentFailure(f"{self._url} was lost at {kind}: {brief(error)}") from error
        try:
            return _read(text)
        except EnvironmentFailure as failure:
            self.end()
            raise EnvironmentFailure(f"{self._url}, asked to {kind}: {failure}") from failure

    def end(self) -> None:
        """Close the session, and wait until the server has let go of it. Safe to call twice."""
        with suppress(Exception):  # it is over in any case
            self._connection.send(json.dumps({"type": "close"}))
            deadline = time.monotonic() + min(self._seconds, 5.0)
            while (left := deadline - time.monotonic()) > 0:
                self._connection.recv(timeout=left)  # until it raises that the other end has closed
        with suppress(Exception):
            self._open.close()


class FullError(EnvironmentFailure):
    """The server has no session to give."""


def begin(url: str, *, seconds: float, data: dict[str, Any]) -> tuple[Session, Reply]:
    """Open a session and reset its environment with `data`.

    Raises:
        EnvironmentFailure: as for `Session` and `Session.ask`.
        UserError: the server has no session to give, or refuses the form of the reset.
    """
    patience = time.monotonic() + _CAPACITY_SECONDS
    while True:
        session = Session(url, seconds=seconds)
        try:
            reply = session.ask("reset", data)
        except EnvironmentFailure as failure:
            if not isinstance(failure.__cause__, FullError):
                raise
            if time.monotonic() > patience:
                raise UserError(
                    f"suite 'openenv': {failure}; every environment.workers needs a session of its own, at training as"
                    " at evaluation: start the server with a larger max_concurrent_envs, or lower environment.workers"
                ) from None
            time.sleep(0.2)
            continue
        if isinstance(reply, Refusal):
            session.end()
            raise UserError(f"suite 'openenv': {url} refuses a reset with {data}: {reply.words}")
        return session, reply


class _Stay(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: only the host that the user named is spoken to."""

    def redirect_request(self, *arguments: Any, **more: Any) -> None:
        return None


def fetch(url: str, path: str, *, seconds: float) -> dict[str, Any]:
    """A JSON object that the server offers by HTTP; empty where it does not."""
    address = "http" + url.rstrip("/").removeprefix("http").removeprefix("ws") + path
    handlers = [urllib.request.ProxyHandler({})] if is_loopback(url) else []
    try:
        with urllib.request.build_opener(_Stay(), *handlers).open(address, timeout=seconds) as answer:
            found = json.loads(answer.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _read(text: Any) -> Reply | Refusal:
    try:
        message = json.loads(text)
        kind, data = message["type"], message["data"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise EnvironmentFailure(f"the answer is none of OpenEnv's: {brief(text)}") from None
    if kind == "error" and isinstance(data, dict):
        return _error(cast("dict[str, Any]", data))
    if kind == "observation" and isinstance(data, dict):
        fields = cast("dict[str, Any]", data)
        observation, reward, done = fields.get("observation"), fields.get("reward"), fields.get("done")
        with suppress(OverflowError):
            if isinstance(observation, dict) and isinstance(reward, int | float | None) and isinstance(done, bool):
                return Reply(cast("dict[str, Any]", observation), float(reward or 0), done)
    raise EnvironmentFailure(f"the answer is none of OpenEnv's: {brief(text)}")


def _error(data: dict[str, Any]) -> Refusal:
    code, words = data.get("code"), str(data.get("message"))
    if code == "VALIDATION_ERROR":
        errors = data.get("errors")
        found = cast("list[Any]", errors) if isinstance(errors, list) else []
        reasons = [str(cast("dict[str, Any]", e).get("msg")) for e in found if isinstance(e, dict)]
        return Refusal(brief("; ".join(reasons) or words))
    if code == "CAPACITY_REACHED":
        raise FullError(f"it has no session to give: {brief(words)}")
    raise EnvironmentFailure(f"it reports {code}: {brief(words)}")
