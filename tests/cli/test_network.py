"""Nothing goes over the network unless it is asked for: a run, its evaluation and its report, with every Python process
of them refused all addresses but this machine's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Python imports a module of this name in every process, workers too, before anything else.
SITECUSTOMIZE = """
import os, sys

def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"):
        address = arguments[1]
        if address is None or not isinstance(address, tuple):  # a connected socket's, or a path of AF_UNIX
            return
        host = str(address[0])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = str(arguments[0])
    else:
        return
    if host.startswith("127.") or host in ("::1", "localhost", "None"):
        return
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(f"{event} {host}\\n")
    raise OSError(f"refused: {event} {host}")

sys.addaudithook(guard)
with open(os.environ["NETWORK_LOG"] + ".processes", "a") as log:
    log.write(f"{os.getpid()}\\n")
"""


@pytest.fixture
def guarded(tmp_path: Path, cli_cache: Path) -> dict[str, str]:
    folder = tmp_path / "guard"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    own = {"PYTHONPATH": path, "NETWORK_LOG": str(tmp_path / "network"), "EPO_CACHE": str(cli_cache)}
    return kept | own | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}


def run(guarded: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], env=guarded, capture_output=True, text=True, timeout=240)


def test_a_run_its_evaluation_and_its_report_stay_on_this_machine(guarded: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "network"
    trained = run(guarded, "-m", "epo", "train", "minute.yaml", "steps=1", "--json")
    assert trained.returncode == 0, trained.stderr
    for arguments in (["eval", "runs/minute"], ["report", "runs/minute"]):
        done = run(guarded, "-m", "epo", *arguments)
        assert done.returncode == 0, done.stderr
    assert json.loads(trained.stdout)["finished"] and Path("runs/minute/report.html").is_file()
    assert not log.exists(), log.read_text()
    processes = (tmp_path / "network.processes").read_text().split()
    assert len(processes) >= 7, "three commands, and two workers each of a run and of an evaluation"

    # The guard would have noticed.
    for attempt in ("socket.create_connection(('192.0.2.1', 80), 1)", "socket.getaddrinfo('huggingface.co', 443)"):
        assert "refused: " in run(guarded, "-c", f"import socket; {attempt}").stderr
    assert len(log.read_text().splitlines()) == 2
