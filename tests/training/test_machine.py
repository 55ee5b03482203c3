"""What the metrics say of memory and of replaced workers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from epo.environments import make_suite
from epo.environments.pool import EnvPool
from epo.training import machine
from epo.training.machine import MachineWatch

OPTIONS = {"length": 3, "choices": 2, "tasks": 4}
TASK = make_suite("corridor", OPTIONS).tasks("train")[0]
CALM = {"workers/died": 0.0, "workers/hung": 0.0, "workers/failed": 0.0, "workers/grown": 0.0}


def resident_mb(*pids: int) -> float:
    """As `ps` says."""
    said = subprocess.run(["ps", "-o", "rss=", "-p", ",".join(map(str, pids))], capture_output=True, text=True).stdout
    return sum(map(int, said.split())) / 1024


def children() -> set[int]:
    said = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    return set(map(int, said.split()))


def test_memory_is_what_ps_says():
    before = children()
    with EnvPool("corridor", OPTIONS, size=2) as pool:
        watch = MachineWatch(pool)
        assert watch.metrics()["memory/workers_mb"] == 0, "no worker has begun"
        pool.gather([pool.submit_reset(slot, TASK) for slot in (0, 1)])
        found = watch.metrics()
        assert found["memory/workers_mb"] == pytest.approx(resident_mb(*children() - before), rel=0.1)
        assert found["memory/learner_mb"] == pytest.approx(resident_mb(os.getpid()), rel=0.1)
        held = np.ones(300 * 2**17)
        assert watch.metrics()["memory/learner_mb"] - found["memory/learner_mb"] == pytest.approx(300, abs=30)
        assert held.nbytes == 300 * 2**20


def test_a_replaced_worker_is_counted_once(tmp_path: Path):
    with EnvPool("failing", {"log": str(tmp_path / "log"), "at": 1, "kills": 2}, size=1) as pool:
        watch = MachineWatch(pool)
        for expected in (CALM | {"workers/died": 2.0}, CALM):
            pool.wait(pool.submit_reset(0, TASK))
            pool.wait(pool.submit_step(0, "push"))
            assert {name: value for name, value in watch.metrics().items() if name in CALM} == expected


def test_without_a_process_table_there_is_no_memory_to_tell(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "resident_bytes", lambda: None)
    with EnvPool("corridor", OPTIONS, size=1) as pool:
        assert MachineWatch(pool).metrics() == CALM
