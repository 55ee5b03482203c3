"""Nothing goes over the network unless it is asked for: with every Python process of the commands refused all addresses
but this machine's own; and where the machine allows it, with every process of them, JVMs too, in a network that has
nothing but a loopback."""

from __future__ import annotations

import json
import os
import shutil
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

# In a network namespace of its own: brings the loopback up, runs a command, and prints the kernel's counts of packets
# that had nowhere to go, after the command and after an attempt that is known.
ALONE = """
import contextlib, fcntl, json, socket, struct, subprocess, sys
from pathlib import Path

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 0x41))  # SIOCSIFFLAGS: up and running

def lost():
    rows = Path("/proc/net/snmp").read_text().splitlines()
    pairs = [pair for names, values in zip(rows[::2], rows[1::2]) for pair in zip(names.split(), values.split())]
    pairs += [line.split() for line in Path("/proc/net/snmp6").read_text().splitlines()]
    wanted = ("OutNoRoutes", "Ip6OutNoRoutes", "NoPorts", "Udp6NoPorts")
    return sum(int(value) for name, value in pairs if name in wanted)

subprocess.run([sys.executable, "-m", "epo", *sys.argv[1:]], check=True, stdout=sys.stderr)
counts = [lost()]
with contextlib.suppress(OSError):
    socket.create_connection(("192.0.2.1", 80), 1)
print(json.dumps([*counts, lost()]))
"""
SWEEP = """
name: two
recipe: minute.yaml
seeds: [0]
set: {steps: 1}
arms: {plain: {}, bonus: {entropy: {method: bonus, coefficient: 0.01}}}
"""
SCIENCEWORLD = (
    *("environment.suite=scienceworld", "environment.options={tasks: [lifespan-longest-lived]}"),
    *("environment.max_turns=2", "model.max_context=4096"),
)


@pytest.fixture(autouse=True)
def sweep_file(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(SWEEP)


@pytest.fixture
def environment(tmp_path: Path, cli_cache: Path) -> dict[str, str]:
    """Nothing that would keep a library offline."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    return kept | {"EPO_CACHE": str(cli_cache), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}


@pytest.fixture
def guarded(tmp_path: Path, environment: dict[str, str]) -> dict[str, str]:
    folder = tmp_path / "guard"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return environment | {"PYTHONPATH": path, "NETWORK_LOG": str(tmp_path / "network")}


def run(guarded: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], env=guarded, capture_output=True, text=True, timeout=800)


@pytest.mark.timeout(900)
def test_nothing_of_these_commands_leaves_this_machine(guarded: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "network"
    for command in (
        ("train", "minute.yaml", "steps=1"),
        *(("eval", "runs/minute"), ("report", "runs/minute")),
        *(("sweep", "two.yaml"), ("compare", "sweeps/two")),
    ):
        done = run(guarded, "-m", "epo", *command)
        assert done.returncode == 0, done.stderr
    assert Path("runs/minute/report.html").is_file()
    assert not log.exists(), log.read_text()
    processes = (tmp_path / "network.processes").read_text().split()
    assert len(processes) >= 15, (
        "five commands, a sweep's two runs, and two workers each of three runs and an evaluation"
    )

    # The guard would have noticed.
    for attempt in ("socket.create_connection(('192.0.2.1', 80), 1)", "socket.getaddrinfo('huggingface.co', 443)"):
        assert "refused: " in run(guarded, "-c", f"import socket; {attempt}").stderr
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.timeout(900)
def test_a_run_with_jvms_looks_for_no_way_out(environment: dict[str, str]) -> None:
    """JVMs and native code are not under the guard; the kernel counts whatever tries."""
    alone = ("unshare", "--map-root-user", "--net")
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no network namespace can be made here (unshare --map-root-user --net)")
    command = ("train", "minute.yaml", "steps=1", *SCIENCEWORLD)
    done = subprocess.run(
        [*alone, sys.executable, "-c", ALONE, *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    after_the_run, after_an_attempt = json.loads(done.stdout)
    assert after_the_run == 0 < after_an_attempt
    assert Path("runs/minute/summary.json").is_file()
