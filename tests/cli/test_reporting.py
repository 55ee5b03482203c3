"""`epo report` and `epo watch` as commands: what they print, refuse, and how they end."""

from __future__ import annotations

import json
import select
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epo.recipe import load_config
from epo.reporting.pages import builder as page_builder
from epo.training import session


def make_run(path: Path, *overrides: str, steps: int = 2) -> Path:
    """A run of an older version: metrics and nothing else."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(load_config("base", [f"steps={steps}", *overrides]).to_yaml())
    lines = [json.dumps({"step": step, "entropy/mean": 1.0}) + "\n" for step in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("".join(lines))
    return path


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], 90)
    assert ready, "nothing was printed in time"
    return process.stdout.readline()


def test_report_of_a_run_lies_in_its_folder(epo: Callable[..., Any]) -> None:
    make_run(Path("runs/a"))
    done = epo("report", "runs/a")
    assert (done.code, done.err) == (0, "")
    assert "runs/a/report.html (1 run, " in done.out
    assert Path("runs/a/report.html").read_text().startswith("<!doctype html>")


def test_report_of_a_folder_of_runs_as_json(epo: Callable[..., Any]) -> None:
    make_run(Path("sweep/a"), "seed=0")
    make_run(Path("sweep/b"), "seed=1")
    done = epo("report", "sweep", "--json")
    assert done.code == 0
    result = json.loads(done.out)
    assert result["report"] == "sweep/report.html"
    assert result["runs"] == ["sweep/a", "sweep/b"]
    assert result["embedded_steps"] == {"a": [], "b": []}
    assert result["bytes"] == Path("sweep/report.html").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "nowhere"], "there is no run in 'nowhere'"),
        (["report", "."], "is no run"),
        (["report", "a", "b"], "--out"),
        (["report", "a", "--steps", "1;2"], "--steps '1;2'"),
        (["report", "a", "--steps", "1"], "step 1 has no trajectories"),
        (["report", "a", "--out", "a/config.yaml/x.html"], "--out"),
        (["watch", "nowhere"], "there is no run in 'nowhere'"),
        (["watch", "a", "--host", "0.0.0.0"], "--allow-remote"),
        (["watch", "a", "--token", "short"], "at least 16"),
    ],
)
def test_mistakes_are_one_line(epo: Callable[..., Any], arguments: list[str], said: str) -> None:
    if arguments != ["report", "."]:
        make_run(Path("a"))
        make_run(Path("b"))
    done = epo(*arguments)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
    assert not Path("a/report.html").exists()


@pytest.mark.parametrize("command", ["report", "watch"])
def test_help_has_examples(epo: Callable[..., Any], command: str) -> None:
    done = epo(command, "--help")
    assert done.code == 0
    assert f"epo {command} runs/try1" in done.out


def test_a_port_that_is_taken(epo: Callable[..., Any]) -> None:
    make_run(Path("a"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = epo("watch", "a", "--port", str(port))
    assert done.code == 2
    assert f"port {port}" in done.err
    assert "in use" in done.err
    assert "--port 0" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_watch_serves_until_it_is_stopped(start_epo: Callable[..., subprocess.Popen[str]], number: int) -> None:
    make_run(Path("a"))
    process = start_epo("watch", "a", "--port", "0", "--json")
    started = json.loads(first_line(process))
    assert started["runs"] == 1
    assert started["url"].startswith("http://127.0.0.1:")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(started["url"], timeout=30) as answer:
        assert b"page-data" in answer.read()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")


def test_watch_for_others_makes_up_a_token(start_epo: Callable[..., subprocess.Popen[str]]) -> None:
    make_run(Path("a"))
    process = start_epo("watch", "a", "--port", "0", "--host", "0.0.0.0", "--allow-remote")
    line = first_line(process)
    assert line.startswith("1 run at http://")
    token = line.partition("?token=")[2].split()[0]
    assert len(token) >= 32
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_run_without_plotly_ends_with_a_note(epo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (page_builder, session):
        monkeypatch.setattr(module, "has_plotly", lambda: False)
    done = epo("train", "minute.yaml", "--name", "plain")
    assert done.code == 0, done.err
    assert "pip install -e '.[report]'" in done.err.replace("\n", " ").replace("  ", " ")
    assert "report:" not in done.out
    assert json.loads(Path("runs/plain/summary.json").read_text())["report"] is None
    assert not Path("runs/plain/report.html").exists()
    assert epo("report", "runs/plain").code == 2
