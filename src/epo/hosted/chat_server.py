"""A client of an OpenAI-compatible server's chat completions: one answer to one conversation, or why there is none.

There are three kinds of failure. What would fail again at every request (a wrong address, key, model or field) is a
`UserError`. What may pass (429, 5xx, a lost connection, no answer in time, an answer that is none) is tried again a
bounded number of times, after a pause that grows and is never shorter than the server's `Retry-After`. A request that
fails all the same, once others were answered, is that request's own matter: `Refused`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import urlsplit

import httpx2

from epo.agent.messages import Message
from epo.errors import UserError
from epo.types import TokenCounts

RETRIES = 6
FIRST_WAIT_SECONDS = 1.0
"""Before the first retry; doubled before every further one."""
MAX_WAIT_SECONDS = 120.0
"""A server that asks for a longer pause has no room for an evaluation today."""
_MAX_BYTES = 16 * 2**20
"""Of one answer."""
_OWN_FIELDS = ("messages", "model", "n", "stream")
_CUT = ("length", "content_filter")
"""Values of `finish_reason` by which the model did not end its turn. For the opposite servers have several words."""
_TOO_LONG = re.compile(r"context[ _-]?(length|size|window)|exceed_context", re.IGNORECASE)
_PASSING = (408, 409, 425, 429)


class Refused(RuntimeError):
    """One request has no answer; others had, or may have."""


class PromptTooLong(Refused):
    """The conversation does not fit into the model's context."""


class _Passing(Exception):
    """May pass.

    Args:
        after: seconds to wait at least.
        is_strange: of a server that has answered nothing yet, it speaks of a wrong address.
        is_gone: nobody is there.
    """

    def __init__(self, reason: str, *, after: float = 0.0, is_strange: bool = False, is_gone: bool = False) -> None:
        super().__init__(reason)
        self.after, self.is_strange, self.is_gone = after, is_strange or is_gone, is_gone


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    text: str
    finished: bool
    """The model ended its turn; False when the response was cut."""
    counts: TokenCounts | None
    """As the server counts; None where it does not tell."""


class ChatServer:
    """Answers conversations, many at once, from a thread of its own. A context manager.

    Connects to the host of `url` and no other; where that is another machine, through the proxy that the environment
    names (HTTPS_PROXY). Follows no redirect.

    Args:
        url: where `/chat/completions` follows, usually ending in `/v1`.
        model: its name there.
        key_variable: the environment variable that holds the key; None sends none.
        fields: added to every request; None leaves one out that would be sent.
        timeout_seconds: for one answer.
        first_wait_seconds: before the first retry.

    Raises:
        UserError: an address that is none, a variable without a key, a field that is not free.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str | None = None,
        fields: Mapping[str, Any] | None = None,
        timeout_seconds: float,
        first_wait_seconds: float = FIRST_WAIT_SECONDS,
    ) -> None:
        self.url, self.model = _checked_url(url), model
        self._key = None if key_variable is None else _read_key(key_variable)
        self._key_variable = key_variable
        self.fields = dict(fields or {})
        for name in self.fields:
            if name in _OWN_FIELDS:
                raise UserError(f"--request {name}=...: this field is not free; leave it out")
        self._timeout_seconds = timeout_seconds
        self._first_wait_seconds = first_wait_seconds
        self._random = random.Random()  # spreads the retries of many; nothing is played by it
        self._has_answered = False
        self.retries = 0
        """Requests that were sent again."""

    @property
    def is_here(self) -> bool:
        """The address is this machine's own."""
        host = urlsplit(self.url).hostname or ""
        return host in ("localhost", "::1") or host.startswith("127.")

    @property
    def shows_key(self) -> bool:
        """The key would leave this machine unencrypted."""
        return self._key is not None and self.url.startswith("http:") and not self.is_here

    def __enter__(self) -> Self:
        headers = {"Content-Type": "application/json", "User-Agent": "epo"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        self._client = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(self._timeout_seconds, connect=min(20.0, self._timeout_seconds)),
            limits=httpx2.Limits(max_connections=None),
            follow_redirects=False,
            trust_env=not self.is_here,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat-server", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives up what is not answered yet."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def ask(self, messages: Sequence[Message], *, temperature: float, max_tokens: int, seed: int) -> Future[Reply]:
        """Ask for the next message. The result, or `Refused` or `UserError`, comes in a thread of the server's own."""
        body = {"model": self.model, "messages": list(messages)}
        body |= {"temperature": temperature, "max_tokens": max_tokens, "seed": seed} | self.fields
        content = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        return asyncio.run_coroutine_threadsafe(self._answer(content), self._loop)

    async def _answer(self, content: bytes) -> Reply:
        attempt = 0
        while True:
            try:
                reply = await self._try(content)
            except _Passing as passing:
                wait = self._wait(passing, attempt)
            else:
                self._has_answered = True
                return reply
            attempt += 1
            self.retries += 1
            await asyncio.sleep(wait)

    def _wait(self, passing: _Passing, attempt: int) -> float:
        """Seconds until the next try; raises where there is none."""
        if passing.is_strange and not self._has_answered:
            raise UserError(f"{passing}: {_CHECK_ADDRESS}")
        if passing.after > MAX_WAIT_SECONDS:
            raise UserError(f"{passing} and asks to wait {passing.after:.0f} s: try again after that")
        if attempt == RETRIES:
            said = f"{passing}, {RETRIES + 1} times"
            if self._has_answered and not passing.is_gone:
                raise Refused(said)
            raise UserError(f"{said}: see what the server reports, and try again")
        return max(passing.after, self._first_wait_seconds * 2**attempt * self._random.uniform(0.5, 1.0))

    async def _try(self, content: bytes) -> Reply:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                status, headers, answer = await self._post(content)
        except (TimeoutError, httpx2.ReadTimeout, httpx2.WriteTimeout):
            raise _Passing(f"{self.url} does not answer within {self._timeout_seconds:g} s (--timeout)") from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.UnsupportedProtocol) as error:
            raise _Passing(f"{self.url} cannot be reached ({_reason(error)})", is_gone=True) from None
        except httpx2.RequestError as error:
            raise _Passing(f"{self.url} broke off the connection ({_reason(error)})") from None
        return self._judge(status, headers, answer)

    async def _post(self, content: bytes) -> tuple[int, httpx2.Headers, bytes]:
        async with self._client.stream("POST", f"{self.url}/chat/completions", content=content) as response:
            parts: list[bytes] = []
            size = 0
            async for part in response.aiter_bytes():
                parts.append(part)
                if (size := size + len(part)) > _MAX_BYTES:
                    raise _Passing(f"{self.url} answers with more than {_MAX_BYTES // 2**20} MiB")
        return response.status_code, response.headers, b"".join(parts)

    def _judge(self, status: int, headers: httpx2.Headers, answer: bytes) -> Reply:
        if status == 200:
            return self._read(answer)
        error = _error_of(answer)
        said = f"{self.url} answers {status}{self._quoted(error, answer)}"
        if status in (401, 403):
            given = f"that ${self._key_variable} holds a key" if self._key else "--api-key-env VARIABLE names a key"
            # Without the server's words, which may repeat a part of the key.
            raise UserError(f"{self.url} answers {status}: see that {given} that may use {self.model!r} there")
        if status == 404:
            raise UserError(f"{said}: {_CHECK_ADDRESS}, and --model {self.model!r}")
        if 300 <= status < 400:
            raise UserError(f"{self.url} answers {status}, a redirect, which is not followed: give the final address")
        if error.get("code") == "insufficient_quota":
            raise UserError(f"{said}: the account has no quota left")
        if status in _PASSING or status >= 500:
            raise _Passing(said, after=_retry_after(headers))
        if any(_TOO_LONG.search(str(error.get(name) or "")) for name in ("code", "type", "message")):
            raise PromptTooLong(said)
        if self._has_answered:
            raise Refused(said)
        raise UserError(f"{said}: --request FIELD=VALUE changes a field of the request, --request FIELD=null omits it")

    def _read(self, answer: bytes) -> Reply:
        try:
            tree = json.loads(answer)
            choice = tree["choices"][0]
            text = choice["message"].get("content")
            cut = choice.get("finish_reason") in _CUT
            if text is not None and not isinstance(text, str):
                raise TypeError
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            start = self._clean(answer.decode("utf-8", "replace"))[:100]
            raise _Passing(f"{self.url} answers with what is no chat completion ({start!r})", is_strange=True) from None
        # Halves of surrogate pairs, which no tokenizer takes, are read as question marks.
        text = (text or "").encode("utf-8", "replace").decode()
        return Reply(text=text, finished=not cut, counts=_counts(tree.get("usage")))

    def _quoted(self, error: Mapping[str, Any], answer: bytes) -> str:
        text = error.get("message") or answer.decode("utf-8", "replace")
        clean = self._clean(str(text))
        return f" ({clean})" if clean else ""

    def _clean(self, text: str) -> str:
        text = text.replace(self._key, "[the key]") if self._key else text
        return " ".join(text.split())[:300]


_CHECK_ADDRESS = "check --server, an address after which /chat/completions follows, usually ending in /v1"


def _checked_url(url: str) -> str:
    clean = url.strip().rstrip("/").removesuffix("/chat/completions")
    try:
        parts = urlsplit(clean)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        httpx2.URL(clean)
    except (ValueError, httpx2.InvalidURL):
        is_address, parts = False, urlsplit("")
    if not is_address or not clean.isprintable() or " " in clean or parts.query or parts.fragment:
        raise UserError(f"--server {url!r} is no address of a server: give one such as http://127.0.0.1:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise UserError("--server holds a name or a password, which would be written down: use --api-key-env VARIABLE")
    return clean


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"--api-key-env {variable}: there is no key in ${variable}; export it, or leave the option out")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"--api-key-env {variable}: what ${variable} holds cannot be a key; export it anew")
    return key


def _error_of(answer: bytes) -> dict[str, Any]:
    """The `error` of a body as OpenAI and others write it; empty for anything else."""
    try:
        tree = json.loads(answer)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(tree, dict):
        return {}
    body = cast("dict[str, Any]", tree)
    error = body.get("error", body.get("detail", body))
    return cast("dict[str, Any]", error) if isinstance(error, dict) else {"message": error}


def _counts(usage: Any) -> TokenCounts | None:
    if not isinstance(usage, dict):
        return None
    told = cast("dict[str, Any]", usage)
    found: list[Any] = [told.get(name) for name in ("prompt_tokens", "completion_tokens")]
    is_count = [type(count) is int and 0 <= count < 2**53 for count in found]
    return TokenCounts(*found) if all(is_count) else None


def _retry_after(headers: httpx2.Headers) -> float:
    """Seconds, from either form that HTTP has for it; 0 without one."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())[:200]
