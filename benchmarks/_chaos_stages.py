"""Where faults happen: two Ray nodes on the loopback, or in two network namespaces with a cable between them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # on the loopback
os.environ["RAY_AUTH_MODE"] = "disabled"  # nobody else is on the loopback or in the namespaces
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112 - what others on the machine need is no fault of ours

import numpy as np
import ray
from ray.cluster_utils import Cluster

STORE_BYTES = 100_000_000


def ours(title: str) -> list[int]:
    """Living processes with that title which descend from this one."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(") ")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")

    def is_ours(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return sorted(pid for pid, found in titles.items() if title in found and is_ours(pid))


def below(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((folder / "stat").read_text().rpartition(") ")[2].split()[1]) == pid:
                found += below(int(folder.name))
    return found


class Stage:
    """What every stage has: processes to kill, of this run only."""

    address: str

    def kill_worker(self) -> None:
        os.kill(ours("ray::RolloutWorker")[0], signal.SIGKILL)

    def kill_rank(self) -> None:
        os.kill(ours("ray::RayTrainWorker")[-1], signal.SIGKILL)

    def mend(self) -> None:
        """What happens once somebody is given up."""

    def close(self) -> None:
        """End everything that was started."""


class TwoNodes(Stage):
    """Two nodes on the loopback, the first of which has the driver."""

    def __init__(self) -> None:
        node = {"num_cpus": 4, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=node)
        self.second: Any = self.cluster.add_node(**node)
        self.address = self.cluster.address
        self.held: list[Any] = []
        self.stopped: list[int] = []

    def lose_node(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)

    def stop_node(self) -> None:
        """The second node says nothing any more, and no connection is closed: every process of it stops."""
        raylet = self.second.all_processes["raylet"][0].process.pid
        self.stopped = below(raylet)
        for pid in self.stopped:
            os.kill(pid, signal.SIGSTOP)

    def fill_store(self) -> None:
        """Twice the store's memory in objects that somebody still holds."""
        size = STORE_BYTES // 10
        self.held = [ray.put(np.random.default_rng(n).bytes(size)) for n in range(20)]

    def close(self) -> None:
        for pid in self.stopped:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.cluster.shutdown()


class Engines(TwoNodes):
    """The same with a vLLM engine beside every rollout worker."""

    def kill_engine(self) -> None:
        os.kill(ours("epo.sampling._vllm_worker")[0], signal.SIGKILL)


HOSTS = ("epo-one", "epo-two")
CABLE = "epo-cable"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
HEALTH = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}
"""Ray's own settings for how soon a node that says nothing is dead; by default that takes a minute."""


class TwoHosts(Stage):
    """A node in each of two network namespaces, which a veth pair connects. This process is in the first one.

    `inside` starts a process there. The cable is cut at its far end, so that this host notices nothing, or packets are
    addressed to hardware that nobody has, and lost without a word on both sides.
    """

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="epo-", dir="/tmp")  # short: sockets are in it
        self.address = f"{ADDRESSES[0]}:6399"
        common = ["--num-cpus=4", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats", "--block"]
        head = [f"--node-ip-address={ADDRESSES[0]}", "--head", "--port=6399", "--include-dashboard=false"]
        other = [f"--node-ip-address={ADDRESSES[1]}", f"--address={self.address}"]
        self.timer: threading.Timer | None = None
        self._mend: Callable[[], None] = lambda: None
        self.nodes = [self._start([*head, f"--temp-dir={self.folder}", *common])]
        try:
            self._wait(1)
            self.nodes.append(self._start([*other, *common], host=HOSTS[1]))
            self._wait(2)
        except BaseException:
            self.close()
            raise

    def _start(self, arguments: list[str], *, host: str | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments]
        environment = os.environ | {f"RAY_{name}": str(value) for name, value in HEALTH.items()}
        environment["GLOO_SOCKET_IFNAME"] = CABLE  # this machine's name stands for an address outside
        return subprocess.Popen(
            [*(("ip", "netns", "exec", host) if host else ()), *command],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True,
        )  # fmt: skip

    def _wait(self, count: int) -> None:
        """Until so many nodes answer."""
        due = time.monotonic() + 120
        check = f"import ray; ray.init(address={self.address!r}, logging_level='ERROR'); print(len(ray.nodes()))"
        while time.monotonic() < due:
            done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
            if done.stdout.strip().endswith(str(count)):
                return
            time.sleep(1)
        raise TimeoutError(f"no Ray cluster of {count} nodes at {self.address}: {done.stderr[-500:]}")

    def unplug(self, *, mend: bool = False) -> None:
        """
        Args:
            mend: plug it in again once somebody is given up.
        """
        ip("-n", HOSTS[1], "link", "set", CABLE, "down")
        if mend:
            self._mend = self._plug_in

    def unplug_for(self, seconds: float) -> None:
        self.unplug()
        self.timer = threading.Timer(seconds, self._plug_in)
        self.timer.start()

    def lose_packets(self) -> None:
        """Until somebody is given up."""
        for host, other in zip(HOSTS, reversed(ADDRESSES), strict=True):
            ip("-n", host, "neigh", "replace", other, "lladdr", "02:00:00:00:00:99", "nud", "permanent", "dev", CABLE)
        self._mend = self._find_packets

    def mend(self) -> None:
        mend, self._mend = self._mend, lambda: None
        mend()

    def _plug_in(self) -> None:
        ip("-n", HOSTS[1], "link", "set", CABLE, "up")

    def _find_packets(self) -> None:
        for host, other in zip(HOSTS, reversed(ADDRESSES), strict=True):
            ip("-n", host, "neigh", "del", other, "dev", CABLE)

    def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        for node in reversed(self.nodes):
            for pid in below(node.pid):
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def reason_against_hosts() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("ip") is None:
        return "needs iproute2"
    try:
        ip("netns", "add", "epo-try")
        ip("netns", "delete", "epo-try")
    except subprocess.CalledProcessError as error:
        return f"no network namespaces: {error.stderr.decode().strip()}"
    return None


def connect_hosts() -> None:
    """Two namespaces and a cable; anything that was left of earlier ones is gone."""
    disconnect_hosts()
    for host in HOSTS:
        ip("netns", "add", host)
    ip("link", "add", CABLE, "netns", HOSTS[0], "type", "veth", "peer", "name", CABLE, "netns", HOSTS[1])
    for host, address, other in zip(HOSTS, ADDRESSES, reversed(ADDRESSES), strict=True):
        ip("-n", host, "addr", "add", f"{address}/24", "dev", CABLE)
        ip("-n", host, "link", "set", CABLE, "up")
        ip("-n", host, "link", "set", "lo", "up")
        ip("-n", host, "route", "add", "default", "via", other)  # Ray asks the way out for its own address


def disconnect_hosts() -> None:
    for host in HOSTS:
        with suppress(subprocess.CalledProcessError):
            ip("netns", "delete", host)


def inside(arguments: list[str]) -> int:
    """Run a Python program on the first host; returns its exit code."""
    environment = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}  # on the host's address
    return subprocess.run(
        ["ip", "netns", "exec", HOSTS[0], sys.executable, *arguments], env=environment, check=False
    ).returncode
