"""The live page's server, over real connections: whom it answers, and what, while a run is at work."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import uvicorn
import viewer_run

from epo.errors import UserError
from epo.reporting.pages.guard import hostname
from epo.reporting.pages.watch import WatchedRuns, make_app, serve
from epo.reporting.reading.trajectory_files import TrajectoryFiles
from epo.reporting.trajectories import index_entry

TOKEN = "0123456789abcdefABCDEF"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass(frozen=True)
class Client:
    """Sends requests as they are, without tidying up paths or headers."""

    port: int
    headers: Mapping[str, str]

    def get(self, path: str, *, method: str = "GET", **headers: str | None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        given = {"host": f"127.0.0.1:{self.port}", **self.headers}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in given.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode())
        connection.close()
        return answer

    def after(self, *cursors: str) -> list[dict[str, Any]]:
        return self.get(f"/api/page?after={quote(json.dumps(cursors))}").json["runs"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """`start(paths, token=None)`: a server in a thread."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def go(*paths: Path, token: str | None = None, hosts: tuple[str, ...] = ("localhost",)) -> Client:
        listening = socket.create_server(("127.0.0.1", 0))
        app = make_app(WatchedRuns(paths), hosts=hosts, token=token)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        running.append((server, thread))
        return Client(listening.getsockname()[1], {})

    yield go
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    vocabulary = viewer_run.Vocabulary()
    records = {step: viewer_run.make_records(vocabulary, step=step, groups=1, members=2) for step in (1, 2, 3)}
    return viewer_run.write_run(tmp_path / "runs" / "one", records, vocabulary.pieces, "steps=40")


def add_step(run: Path, step: int) -> None:
    """As a training writes it."""
    records = viewer_run.make_records(viewer_run.Vocabulary(), step=step, groups=1, members=2)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run / "trajectories" / f"step_{step:06d}.jsonl").write_text(lines)
    for name, entry in (
        ("trajectories/index.jsonl", index_entry(records)),
        ("metrics.jsonl", {"step": step, "entropy/mean": 1 / step}),
    ):
        text = json.dumps(entry) + "\n"
        with (run / name).open("a", buffering=1) as file:
            file.write(text[:20])
            file.flush()
            file.write(text[20:])


# -- whom it answers


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8765", "[::1]:80", "10.1.2.3"])
def test_names_of_this_server_and_addresses_are_answered(start: Callable[..., Client], run: Path, host: str) -> None:
    assert start(run).get("/api/page", host=host).status == 200


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example:8765",
        "[::1].evil",
        "localhost@evil.example",
        "evil.example#localhost",
        "localhost, evil.example",
        "[evil.example]",
        "127.1",
        ".",
    ],
)
def test_other_names_are_not_answered(start: Callable[..., Client], run: Path, host: str | None) -> None:
    client = start(run)
    for path in ("/", "/api/page", "/api/runs/0/trajectories/1", "/api/runs/0/search?q=a", "/nothing"):
        answer = client.get(path, host=host)
        assert answer.status in (400, 403)
        assert "one" not in answer.text.replace("no one", "")


def test_hostnames() -> None:
    assert hostname("a:1") == hostname("A") == "a"
    assert hostname("[::1]:80") == "::1"
    for bad in ("a:b", "a:1:2", "[::1", "[::1]x", "a:１"):
        assert hostname(bad) is None


def test_pages_of_others_are_not_answered(start: Callable[..., Client], run: Path) -> None:
    client = start(run)
    for site in ("cross-site", "same-site"):
        assert client.get("/api/page", sec_fetch_site=site, sec_fetch_mode="cors").status == 403
        assert client.get("/api/page", sec_fetch_site=site, sec_fetch_mode="navigate").status == 403
        assert client.get("/", sec_fetch_site=site, sec_fetch_mode="no-cors").status == 403
        assert client.get("/", sec_fetch_site=site, sec_fetch_mode="navigate").status == 200  # a link
    for site in ("same-origin", "none"):
        assert client.get("/api/page", sec_fetch_site=site, sec_fetch_mode="cors").status == 200


def test_every_answer_has_the_headers_and_none_opens_it_to_other_origins(
    start: Callable[..., Client], run: Path
) -> None:
    client = start(run)
    answers = [
        client.get(path, origin="http://evil.example")
        for path in ("/", "/api/page", "/nothing", "/api/runs/0/trajectories/x", "/api/page?after=x")
    ]
    answers += [client.get("/", host="evil.example"), client.get("/", method="POST"), client.get("/", method="OPTIONS")]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert not any(name.startswith("access-control-") for name in answer.headers)
        assert "server" not in answer.headers or "epo" not in answer.headers["server"]


# -- the token


def test_without_the_token_nothing_is_told(start: Callable[..., Client], run: Path) -> None:
    client = start(run, token=TOKEN)
    wrong = [TOKEN[:-1], TOKEN + "x", TOKEN.lower(), "", "é", "\x00"]
    paths = ["/", "/api/page", "/api/runs/0/trajectories/1", f"/api/page?token={TOKEN}", "/nothing"]
    for path in [*paths, *(f"/?token={quote(token)}" for token in wrong)]:
        answer = client.get(path)
        assert answer.status == 401, path
        assert "token" in answer.json["error"]
        assert TOKEN not in answer.text
    assert client.get("/api/page", cookie='epo_="; =; a[="', authorization=f"Basic {TOKEN}").status == 401


def test_the_token_becomes_a_strict_cookie_once(start: Callable[..., Client], run: Path) -> None:
    client = start(run, token=TOKEN)
    welcome = client.get(f"/?token={TOKEN}")
    assert welcome.status == 200
    assert "one" not in welcome.text.replace("none", "")  # only the way to the page
    pair, *attributes = (part.strip() for part in welcome.headers["set-cookie"].split(";"))
    assert {"httponly", "samesite=strict", "path=/"} <= {attribute.lower() for attribute in attributes}
    page = client.get("/", cookie=f"other=1; {pair}")
    assert (page.status, "set-cookie" in page.headers) == (200, False)
    assert TOKEN not in page.text
    assert client.get("/api/page", cookie=pair).status == 200
    assert client.get("/api/page", authorization=f"Bearer {TOKEN}").status == 200
    assert client.get("/api/page", cookie=pair[:-1]).status == 401
    assert client.get("/api/page", cookie=pair, host="evil.example").status == 403
    assert start(run, token=TOKEN[::-1]).get("/", cookie=pair).status == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_others_reach_it_only_when_that_is_meant(run: Path, host: str) -> None:
    with pytest.raises(UserError, match="--allow-remote"):
        serve([run], host=host, port=0, allow_remote=False, token=TOKEN, on_start=lambda address, count: None)


@pytest.mark.parametrize("token", ["", "short", "with spaces and more", "semicolon;semicolon", "é" * 20])
def test_a_token_that_is_none(run: Path, token: str) -> None:
    with pytest.raises(UserError, match="token must have"):
        serve([run], host="127.0.0.1", port=0, allow_remote=False, token=token, on_start=lambda address, count: None)


# -- what it answers


@pytest.mark.parametrize(
    "path",
    [
        "/../config.yaml",
        "/config.yaml",
        "/api/runs/0/trajectories/../../../config.yaml",
        "/api/runs/0/trajectories/%2e%2e%2f%2e%2e%2fconfig.yaml",
        "/api/runs/0/trajectories/..%2f..%2fconfig.yaml",
        "/api/runs/0/trajectories/..%5c..%5cconfig.yaml",
        "/api/runs/0/trajectories/%252e%252e%252fconfig.yaml",
        "/api/runs/..%2f0/trajectories/1",
        "/api/runs/0/trajectories/1%00",
        "/api/runs/0/trajectories/1.jsonl",
        "/api/runs/0/trajectories/-1",
        "/api/runs/0/trajectories/+1",
        "/api/runs/0/trajectories/%C2%B2",
        "/api/runs/0/trajectories/" + "9" * 5000,
        "/api/runs/1/trajectories/1",
        "/api/runs/-1/trajectories/1",
        "/api/runs/0/trajectories/99",
        "//etc/passwd",
        "/file:///etc/passwd",
        "/api/runs/x/search?q=a",
        "/api/runs/7/search?q=a",
    ],
)
def test_no_path_leads_out_of_the_runs(start: Callable[..., Client], run: Path, path: str) -> None:
    answer = start(run).get(path)
    assert answer.status == 404
    assert set(answer.json) == {"error"}


@pytest.mark.parametrize("name", ["trajectories/step_000002.jsonl", "vocabulary.json", "trajectories"])
def test_links_out_of_the_run_are_not_followed(
    start: Callable[..., Client], run: Path, tmp_path: Path, name: str
) -> None:
    client = start(run)
    assert client.get("/api/runs/0/trajectories/2").status == 200
    (run / name).rename(tmp_path / "secret")
    (run / name).symlink_to(tmp_path / "secret")
    answer = client.get("/api/runs/0/trajectories/2")
    assert answer.status == 404
    assert "link out of the run folder" in answer.json["error"]
    if name != "vocabulary.json":
        assert client.get("/api/runs/0/search?q=kitchen").status == 404


def test_the_page_carries_the_run_and_only_asks_its_own_server(start: Callable[..., Client], run: Path) -> None:
    answer = start(run).get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert '"mode":"live"' in answer.text
    assert 'id="trajectories-' not in answer.text


def test_trajectories_and_search(start: Callable[..., Client], run: Path) -> None:
    client, files = start(run), TrajectoryFiles(run)
    assert client.get("/api/runs/0/trajectories/2").json == json.loads(files.payload(2))
    hits, complete = files.search("garden", steps=[1, 2, 3])
    assert client.get("/api/runs/0/search?q=GARDEN").json == {"hits": hits, "complete": complete}
    assert client.get("/api/runs/0/search?q=" + quote("<think>")).json["complete"]
    for query in ("", "?q=", "?q=" + "x" * 201):
        assert client.get("/api/runs/0/search" + query).status == 400


@pytest.mark.parametrize("after", ["x", "1", '{"a":1}', "[1]", "[[]]", "%5B" * 3000, "%ff", "null"])
def test_cursors_that_are_none(start: Callable[..., Client], run: Path, after: str) -> None:
    assert start(run).get(f"/api/page?after={after}").status == 400


# -- while a run is at work


def test_updates_while_a_training_writes(start: Callable[..., Client], run: Path) -> None:
    client = start(run)
    (shown,) = client.after()
    total = 40
    writer = threading.Thread(target=lambda: [add_step(run, step) for step in range(4, total + 1)])
    writer.start()
    steps, rows, deadline = list(shown["steps"]), list(shown["index"]["step"]), time.monotonic() + 60
    values = list(shown["metrics"]["entropy/mean"])
    cursor = shown["cursor"]
    answers = 0
    while steps[-1] < total and time.monotonic() < deadline:
        (part,) = client.after(cursor)
        assert not part["reset"]
        steps += part["steps"]
        rows += part["index"]["step"]
        values += part["metrics"].get("entropy/mean", [])
        cursor = part["cursor"]
        answers += bool(part["steps"])
    writer.join()
    assert steps == list(range(1, total + 1))
    assert rows == [step for step in steps for _ in range(2)]
    assert values == [float(f"{1 / step:.6g}") for step in steps]
    assert answers > 1


def test_a_restarted_run_and_a_new_one_in_its_folder(start: Callable[..., Client], run: Path, tmp_path: Path) -> None:
    client = start(run.parent)
    (shown,) = client.after()
    cursor = shown["cursor"]
    shutil.rmtree(run)
    (part,) = client.after(cursor)
    assert (part["reset"], part["steps"]) == (False, [])
    assert client.get("/api/runs/0/trajectories/1").status == 404
    assert client.get("/").status == 200
    vocabulary = viewer_run.Vocabulary()
    records = {1: viewer_run.make_records(vocabulary, step=1, groups=1, members=1, seed=5)}
    viewer_run.write_run(tmp_path / "draft", records, vocabulary.pieces).rename(run)
    (part,) = client.after(cursor)
    assert (part["reset"], part["steps"]) == (True, [1])
    assert client.get("/api/runs/0/trajectories/1").json["trajectories"] == records[1]
    viewer_run.write_run(run.parent / "another", records, vocabulary.pieces, "entropy.method=epo")
    first, second = client.after(part["cursor"])
    assert (first["reset"], second["reset"], second["name"]) == (False, True, "another")
    answer = client.get("/api/page").json
    assert len(answer["comparison"]["arms"]) == 2


def test_a_page_of_another_server_is_given_everything(start: Callable[..., Client], run: Path) -> None:
    (before,) = start(run).after()
    (after,) = start(run).after(before["cursor"])
    assert after["reset"]
    assert after["steps"] == [1, 2, 3]
