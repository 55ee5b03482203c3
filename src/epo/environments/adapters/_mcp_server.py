"""A connection to an MCP server, driven from synchronous code."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, cast

from epo.environments.adapters._shared import brief, encodable, is_loopback, require
from epo.errors import EnvironmentFailure

_AGENTS_FAULT = (-32601, -32602)
"""JSON-RPC codes that answer a call which cannot be made: no such method, invalid parameters."""

_MOST_PAGES = 100


class Result(NamedTuple):
    """What a tool answered."""

    text: str
    value: Any
    """Structured data, where the tool gives any; else `text`."""
    failed: bool


class ToolServer:
    """An open connection. `close` ends it, and with it the process, if it is one of ours.

    Args:
        command: starts a server that talks over its standard input and output: program and arguments, no shell.
        variables: environment variables of that process, beside the few that MCP hands on.
        url: of a streamable HTTP server, where there is no command.
        seconds: limit for the start and for every answer.

    Raises:
        EnvironmentFailure: it does not start, or does not speak MCP.
        UserError: the package mcp is missing.
    """

    def __init__(
        self, *, command: list[str] | None, variables: dict[str, str], url: str | None, seconds: float
    ) -> None:
        mcp = require("mcp", extra="mcp")
        from anyio.from_thread import start_blocking_portal

        self._error: type[Exception] = mcp.MCPError
        self._seconds = seconds
        self._open = ExitStack()
        self._what = url or " ".join(command or ())
        try:
            self._portal = self._open.enter_context(start_blocking_portal())
            if command is not None:
                # What the worker is given so that episodes repeat and nothing is left behind, the server needs too.
                ours = {name: os.environ[name] for name in ("TMPDIR", "PYTHONHASHSEED") if name in os.environ}
                target: Any = mcp.StdioServerParameters(command=command[0], args=command[1:], env={**ours, **variables})
            else:
                target = _over_http(str(url), seconds)
            client = mcp.Client(target, read_timeout_seconds=seconds, cache=None)
            self._client: Any = self._open.enter_context(self._portal.wrap_async_context_manager(client))
        except Exception as error:
            self.close()
            raise EnvironmentFailure(f"no MCP server answers at {self._what!r}: {_reason(error)}") from error

    @property
    def name(self) -> str:
        """Of the server and its version, as it says itself."""
        said = self._client.server_info
        return f"{said.name} {said.version}" if said is not None else "unnamed"

    def tools(self) -> dict[str, dict[str, Any]]:
        """Every tool: its description and the JSON schema of its arguments.

        Raises:
            EnvironmentFailure: the server is lost.
        """
        found: dict[str, dict[str, Any]] = {}
        cursor = None
        try:
            for _ in range(_MOST_PAGES):
                page = self._portal.call(partial(self._client.list_tools, cursor=cursor))
                for tool in page.tools:
                    found[tool.name] = {"description": tool.description or "", "schema": tool.input_schema}
                cursor = page.next_cursor
                if not cursor:
                    break
        except Exception as error:
            self.close()
            raise EnvironmentFailure(f"{self._what!r} does not list its tools: {_reason(error)}") from error
        return found

    def call(self, tool: str, arguments: dict[str, Any]) -> Result:
        """Call a tool. What the tool itself finds wrong is a result with `failed`.

        Raises:
            EnvironmentFailure: the server is lost, too slow, or answers what is no result. The connection is closed.
        """
        try:
            answer = self._portal.call(partial(self._client.call_tool, tool, arguments))
        except self._error as error:
            if cast("Any", error).code in _AGENTS_FAULT:
                return Result(str(error), str(error), True)
            self.close()
            raise EnvironmentFailure(f"{self._what!r} was lost at {tool}: {_reason(error)}") from error
        except Exception as error:
            self.close()
            raise EnvironmentFailure(f"{self._what!r} answered {tool} with nonsense: {_reason(error)}") from error
        structured = answer.structured_content
        text = "\n".join(map(_words, answer.content))
        if isinstance(structured, dict) and set(cast("dict[str, Any]", structured)) == {"result"}:
            structured = cast("dict[str, Any]", structured)["result"]  # how the SDK wraps what is no object
        if not answer.content and structured is not None:
            text = json.dumps(structured, ensure_ascii=False)
        return Result(encodable(text), text if structured is None else structured, bool(answer.is_error))

    def close(self) -> None:
        """Safe to call twice."""
        with suppress(Exception, BaseExceptionGroup, asyncio.CancelledError):  # what a lost connection still has to say
            self._open.close()


@asynccontextmanager
async def _over_http(url: str, seconds: float) -> AsyncGenerator[Any]:
    """Streamable HTTP, without the proxies that the environment names where the server is on this machine."""
    http = require("httpx2", extra="mcp")
    async with http.AsyncClient(timeout=http.Timeout(seconds), trust_env=not is_loopback(url)) as client:
        transport = require("mcp.client.streamable_http", extra="mcp").streamable_http_client(url, http_client=client)
        async with transport as streams:
            yield streams


def _words(block: Any) -> str:
    text = getattr(block, "text", None)
    return text if isinstance(text, str) else f"[{getattr(block, 'type', 'content')}]"


def _reason(error: BaseException) -> str:
    """Of a group, as task groups raise them, the first that it holds."""
    while isinstance(error, BaseExceptionGroup):
        error = cast("BaseExceptionGroup[BaseException]", error).exceptions[0]
    return brief(error) or type(error).__name__
