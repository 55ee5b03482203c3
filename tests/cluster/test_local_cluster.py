"""What `--cluster local` opens on this machine, and for whom."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from epo.config import Config
from process_table import LOOPBACK, descendants, listening


def read(pid: int, what: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{what}").read_bytes().decode(errors="replace")
    return ""


def answer(address: str, token: str | None) -> str:
    """What Ray's head says to who asks for the nodes with that token, or without one."""
    headers = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        try:
            ask(b"", metadata=headers, timeout=60)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("learners", [0, 2])
def test_a_local_cluster_is_on_the_loopback_and_asks_for_its_token(
    learners: int, minute_config: Callable[..., Config], tmp_path: Path
) -> None:
    options = ("steps=1", "cluster.workers=1", f"cluster.learners={learners}", "cluster.object_store_mb=100")
    (tmp_path / "recipe.yaml").write_text(minute_config(*options).to_yaml())
    (tmp_path / "home").mkdir()
    # Without what the tests set themselves.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GLOO_"))}
    environment |= {"HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "RAY_memory_monitor_refresh_ms": "0"}
    addresses: set[str] = set()
    titles: set[str] = set()
    answers: list[str] = []
    token = ""
    with (tmp_path / "output").open("w") as output:
        command = [sys.executable, "-m", "epo", "train", "recipe.yaml", "--cluster", "local", "--name", "run"]
        run = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        while run.poll() is None:
            processes = descendants(run.pid) | {run.pid: "epo"}
            addresses |= listening(processes)
            lines = {pid: read(pid, "cmdline") for pid in processes}
            titles |= {line.partition("\0")[0] for line in lines.values()}
            if not token:
                found = (re.search(r"\0RAY_AUTH_TOKEN=([^\0]+)", read(pid, "environ")) for pid in processes)
                token = next((match[1] for match in found if match), "")
            assert not token or not any(token in line for line in lines.values())
            if not answers and any("RolloutWorker" in title for title in titles):
                head = next(match[1] for line in lines.values() if (match := re.search(r"gcs-address=([\d.:]+)", line)))
                answers = [answer(head, given) for given in (None, "0" * len(token), token)]
            time.sleep(0.2)
    finally:
        if run.poll() is None:
            run.terminate()
            run.wait()
    said = (tmp_path / "output").read_text()
    assert run.returncode == 0, said
    assert any("RayTrainWorker" in title for title in titles) == (learners > 0)
    assert addresses and addresses <= LOOPBACK
    assert answers == ["UNAUTHENTICATED", "UNAUTHENTICATED", "OK"]
    written = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert written and not any(token.encode() in file.read_bytes() for file in written)
    assert len(token) >= 32 and token not in said
    assert not (tmp_path / "home" / ".ray").exists(), "Ray's own token, which would be the next run's, too"
