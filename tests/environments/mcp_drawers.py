"""A small MCP server, made with the official SDK: things in drawers. Run as `python mcp_drawers.py [http]`.

Over standard input and output by default; with `http` it prints its port and serves streamable HTTP.
"""

from __future__ import annotations

import os
import socket
import sys
import time

import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("drawers", version="1.0", log_level="WARNING")
drawers: dict[str, str] = {}


@server.tool()
def put(thing: str, drawer: str) -> str:
    """Put a thing into a drawer, wherever it was before."""
    if drawer not in ("left", "right", "top"):
        raise ToolError(f"there is no drawer {drawer}")
    drawers[thing] = drawer
    return f"The {thing} is in the {drawer} drawer."


@server.tool()
def look(drawer: str) -> list[str]:
    """What is in a drawer."""
    return sorted(thing for thing, place in drawers.items() if place == drawer)


@server.tool()
def is_in(thing: str, drawer: str) -> bool:
    """Whether a thing is in a drawer."""
    return drawers.get(thing) == drawer


@server.tool()
def where(thing: str) -> str:
    """The drawer that a thing is in."""
    if thing not in drawers:
        raise ToolError(f"there is no {thing}")
    return drawers[thing]


@server.tool()
def empty() -> str:
    """Empty all drawers."""
    drawers.clear()
    return "All drawers are empty."


@server.tool()
def read_aloud(characters: int) -> str:
    """A text of so many characters."""
    return "x" * characters


@server.tool()
def die() -> str:
    """End the server."""
    os._exit(3)


@server.tool()
def sleep() -> str:
    """Say nothing for a long time."""
    time.sleep(600)
    return "awake"


@server.tool()
def pid() -> int:
    """Of the server."""
    return os.getpid()


if __name__ == "__main__":
    if sys.argv[1:] == ["http"]:
        listener = socket.create_server(("127.0.0.1", 0))
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        uvicorn.Server(uvicorn.Config(server.streamable_http_app(), log_level="warning")).run(sockets=[listener])
    else:
        server.run()
