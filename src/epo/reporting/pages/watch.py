"""The live page: a small server that shows runs while they are at work, and afterwards.

It only reads, and only the files of the runs it was given.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, cast

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from epo.errors import UserError
from epo.evaluation.comparison import compare
from epo.reporting.pages.builder import make_title, page_object, render_page
from epo.reporting.pages.guard import Guard, error
from epo.reporting.reading.run_reader import RunReader, find_runs
from epo.reporting.reading.trajectory_files import MAX_QUERY, TrajectoryFiles

_MAX_RUNS = 1000
_TOKEN_LENGTH = 16


class WatchedRuns:
    """The runs in `paths`, kept up to date; those that appear later in a folder of runs come last.

    Raises:
        UserError: a path is neither a run nor a folder that holds one.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._lock = Lock()
        self._search = Lock()
        self._compared: tuple[list[str], dict[str, Any] | None] = ([], None)
        self.readers = [RunReader(path) for path in find_runs(paths)]
        self._files = [TrajectoryFiles(reader.path) for reader in self.readers]

    def page(self) -> dict[str, Any]:
        """The whole page as it is now."""
        with self._lock:
            self._update()
            runs = [reader.data for reader in self.readers]
            pages = [run.page() for run in runs]
            return page_object(pages, mode="live", title=make_title(runs), comparison=self._comparison())

    def page_after(self, cursors: Sequence[str]) -> dict[str, Any]:
        """What a page at these cursors, one for each of its runs, lacks."""
        with self._lock:
            self._update()
            runs = [reader.data for reader in self.readers]
            partial = [run.page_after(cursor) for run, cursor in zip(runs, cursors, strict=False)]
            partial += [run.page() for run in runs[len(cursors) :]]
            # What is compared rests on evaluations.
            new = any(run["reset"] or run["evaluations"] for run in partial)
            return {"runs": partial} | ({"comparison": self._comparison()} if new else {})

    def trajectories(self, run: int, step: int) -> str:
        """JSON of a step's trajectories.

        Raises:
            UserError: there are none.
        """
        return self._file(run).payload(step)

    def search(self, run: int, text: str) -> dict[str, Any]:
        """Where `text` occurs in the trajectories of a run.

        Raises:
            UserError: there is no such run.
        """
        files = self._file(run)
        with self._search:  # one at a time: it reads every file
            hits, complete = files.search(text, steps=files.steps())
        return {"hits": hits, "complete": complete}

    def _file(self, run: int) -> TrajectoryFiles:
        if not 0 <= run < len(self._files):
            raise UserError(f"there is no run {run} on this page")
        return self._files[run]

    def _update(self) -> None:
        for reader in self.readers:
            reader.update()
        known = {reader.path.resolve() for reader in self.readers}
        for path in self._paths:
            for child in _run_folders(path):
                if child.resolve() in known or len(self.readers) >= _MAX_RUNS:
                    continue
                try:
                    self.readers.append(RunReader(child))
                except (UserError, OSError):  # about to be made, or no run of ours
                    continue
                self._files.append(TrajectoryFiles(child))

    def _comparison(self) -> dict[str, Any] | None:
        runs = [reader.data for reader in self.readers]
        cursors = [run.cursor for run in runs]
        if self._compared[0] != cursors:
            try:
                found = compare(runs).page() if len(runs) > 1 else None
            except UserError:  # such as the same run twice, seen from two folders
                found = None
            self._compared = (cursors, found)
        return self._compared[1]


def make_app(watched: WatchedRuns, *, hosts: Sequence[str], token: str | None) -> Guard:
    """The server's application; see `Guard` for `hosts` and `token`."""

    def page(request: Request) -> Response:
        html, policy = render_page(watched.page(), blobs={})
        return HTMLResponse(html, headers={"content-security-policy": f"{policy}; frame-ancestors 'none'"})

    def update(request: Request) -> Response:
        try:
            cursors = json.loads(request.query_params.get("after", "[]"))
        except (ValueError, RecursionError):
            cursors = None
        if not isinstance(cursors, list) or not all(isinstance(c, str) for c in cast("list[Any]", cursors)):
            return error("after is no JSON list of cursors", 400)
        return _json(json.dumps(watched.page_after(cast("list[str]", cursors)), allow_nan=False))

    def trajectories(request: Request) -> Response:
        run, step = (_number(request.path_params[name]) for name in ("run", "step"))
        if run is None or step is None:
            return error("runs and steps are numbers", 404)
        return _json(watched.trajectories(run, step))

    def search(request: Request) -> Response:
        run, text = _number(request.path_params["run"]), request.query_params.get("q", "")
        if run is None:
            return error("runs are numbers", 404)
        if not 0 < len(text) <= MAX_QUERY:
            return error(f"a search text has 1 to {MAX_QUERY} characters", 400)
        return _json(json.dumps(watched.search(run, text)))

    def not_found(request: Request, problem: Exception) -> Response:
        return error("there is nothing here", 404)

    def refused(request: Request, problem: Exception) -> Response:
        return error(str(problem), 404)

    def failed(request: Request, problem: Exception) -> Response:
        return error("the server could not read the run; its terminal says more", 500)

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/api/page", update),
            Route("/api/runs/{run}/trajectories/{step}", trajectories),
            Route("/api/runs/{run}/search", search),
        ],
        exception_handlers={404: not_found, 405: not_found, UserError: refused, 500: failed},
    )
    return Guard(app, hosts=hosts, token=token)  # outside of everything, so that errors carry its headers, too


def serve(
    paths: Sequence[Path],
    *,
    host: str,
    port: int,
    allow_remote: bool,
    token: str | None,
    on_start: Callable[[str, int], None],
) -> None:
    """Serve the live page of the runs in `paths` until Ctrl-C.

    Args:
        host: name or address to listen on; one that others can reach needs `allow_remote`.
        port: 0 takes a free one.
        token: what visitors must know; made up if others can reach the page and none is given.
        on_start: called with the page's address and the number of runs once it can be opened.

    Raises:
        UserError: no run, a missing package, a port that is taken, an open door without a word that it is meant.
    """
    try:
        import uvicorn
    except ModuleNotFoundError:
        raise UserError("epo watch needs uvicorn. In a checkout: pip install -e '.[report]'") from None
    local = host == "localhost" or _is_loopback(host)
    if not local and not allow_remote:
        raise UserError(
            f"--host {host} lets others reach the page, with all that the run's model and environment wrote: add "
            "--allow-remote if that is meant. Safer: stay on this machine and come by `ssh -L`"
        )
    if token is not None and (len(token) < _TOKEN_LENGTH or not token.isascii() or not token.isalnum()):
        raise UserError(f"the token must have at least {_TOKEN_LENGTH} letters and digits, and nothing else")
    if not local and token is None:
        token = secrets.token_hex(16)
    watched = WatchedRuns(paths)
    with _listen("127.0.0.1" if host == "localhost" else host, port) as listening:
        port = listening.getsockname()[1]
        hosts = ["localhost", host, *(() if local else (socket.gethostname(), socket.getfqdn()))]
        app = make_app(watched, hosts=hosts, token=token)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="off",
            limit_concurrency=64,
            timeout_graceful_shutdown=2,
        )
        shown = _reachable(host)
        address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/" + (f"?token={token}" if token else "")

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets=sockets)
                on_start(address, len(watched.readers))  # from here on it answers, and Ctrl-C ends it

        Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as problem:
        is_address = problem.errno == errno.EADDRNOTAVAIL
        advice = "an address of this machine" if is_address else "another --port, or --port 0 for any that is free"
        raise UserError(
            f"--host {host} --port {port} cannot be listened on ({os.strerror(problem.errno or 0)}): give {advice}"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reachable(host: str) -> str:
    """What to type into a browser for `host`, which may mean every address of this machine."""
    return {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)


def _run_folders(path: Path) -> list[Path]:
    if (path / "config.yaml").is_file():
        return [path]
    try:
        return sorted(child for child in path.iterdir() if (child / "config.yaml").is_file())
    except OSError:
        return []


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")
