"""ScienceWorld in the pool: a JVM that is killed or stopped in an episode costs a restart and nothing else."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from epo.environments.pool import EnvPool
from epo.environments.registry import make_suite
from epo.types import Step

OPTIONS = {"tasks": ["lifespan-longest-lived"], "read_timeout_seconds": 8.0}


def java_processes(session: int) -> list[int]:
    """JVMs that belong to a worker: the pool gives each worker a session of its own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        if "(java" in name and int(rest.split()[3]) == session:
            found.append(int(stat.parent.name))
    return found


def java_of_slot(pool: EnvPool, slot: int) -> int:
    worker = pool._slots[slot].worker
    assert worker is not None
    (jvm,) = java_processes(worker.pid)
    return jvm


@pytest.fixture(scope="module")
def pool():
    with EnvPool("scienceworld", OPTIONS, size=2, timeout_seconds=20.0) as pool:
        yield pool


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_an_episode_goes_on_when_its_jvm_is_lost(pool, how):
    tasks = make_suite("scienceworld", OPTIONS).tasks("train")[:6]
    task, transitions = max(zip(tasks, pool.demonstrate(tasks), strict=True), key=lambda pair: len(pair[1]))
    expected = [transition.step for transition in transitions]
    assert expected[-1].success and len(expected) >= 3

    other = pool.submit_reset(1, task)
    pool.wait(pool.submit_reset(0, task))
    pool.wait(other)
    played: list[Step] = []
    for number, transition in enumerate(transitions):
        if number == 1:
            os.kill(java_of_slot(pool, 0), how)
        disturbed, undisturbed = pool.gather(
            [pool.submit_step(0, transition.action), pool.submit_step(1, transition.action)]
        )
        assert disturbed == undisturbed
        played.append(disturbed)
    assert played == expected
    assert pool.restarts(0) == 1
    assert pool.restarts(1) == 0
