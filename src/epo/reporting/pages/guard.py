"""Who may talk to the live page's server, and what browsers may do with its answers.

Against pages of others that run in the same browser: the Host header must be a name or address of this server (a page
that has its own name point here, DNS rebinding, still sends its name), requests that another site makes are refused,
no header lets another origin read an answer, and none may frame the page.
Against others on the network: a token, without which nothing is answered.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_NOTHING = "default-src 'none'; frame-ancestors 'none'"
_WELCOME = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0;url=/"><a href="/">Go on</a>'


class Guard:
    """Lets requests through to `app` that may be answered.

    Args:
        hosts: names, besides addresses, under which the server is reached.
        token: what a visitor must know; None: everyone on this machine may look.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], token: str | None) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}
        self._token = token
        # Cookies do not know ports: each server has one of its own.
        self._cookie = None if token is None else f"epo_{hashlib.sha256(token.encode()).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("content-security-policy", _NOTHING)
            await send(message)

        answer = self._refusal(scope)
        await (self._app if answer is None else answer)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that does not get through."""
        headers = Headers(scope=scope)
        if not self._knows(headers.getlist("host")):
            return error("this server is not called so: open the page by the address that epo watch printed", 403)
        is_page = scope["path"] == "/"
        site = headers.get("sec-fetch-site", "none")
        opened = is_page and headers.get("sec-fetch-mode") == "navigate"
        if site not in ("none", "same-origin") and not opened:
            return error("requests from other sites are not answered", 403)
        if self._token is None:
            return None
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        if is_page and "token" in query and self._matches(query["token"]):
            # By a page of our own: on a redirect from elsewhere the browser would not send the strict cookie.
            response = HTMLResponse(_WELCOME)
            assert self._cookie is not None
            response.set_cookie(self._cookie, self._token, httponly=True, samesite="strict", path="/")
            return response
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if self._has_cookie(headers) or (scheme.lower() == "bearer" and self._matches(given)):
            return None
        return error("this page needs the token: open the whole address that epo watch printed", 401)

    def _knows(self, hosts: list[str]) -> bool:
        if len(hosts) != 1:
            return False
        name = hostname(hosts[0])
        # An address is never rebound: it is the one the browser talks to.
        return name is not None and (name in self._hosts or is_address(name))

    def _has_cookie(self, headers: Headers) -> bool:
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(self._cookie or "")
        except CookieError:
            return False
        return morsel is not None and self._matches(morsel.value)

    def _matches(self, given: str) -> bool:
        assert self._token is not None
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._token.encode())


def error(text: str, status: int) -> Response:
    """An answer that says to people what is wrong."""
    return Response(json.dumps({"error": text}), status_code=status, media_type="application/json")


def hostname(host: str) -> str | None:
    """The name in a Host header, in small letters, without port and brackets; None if it is none."""
    if host.startswith("["):
        name, closed, rest = host[1:].partition("]")
        if not closed or not is_address(name):
            return None
    else:
        name, colon, port = host.partition(":")
        rest = colon + port
    if rest and not (rest[0] == ":" and rest[1:].isascii() and rest[1:].isdigit()):
        return None
    return name.lower()


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
