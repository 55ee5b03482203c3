"""Engines that die, engines that do not start, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from engines import draw, lively_policy, prompts

from epo.errors import UserError
from epo.sampling import _vllm_engine
from epo.sampling.vllm import VllmSampler


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def are_gone(processes: list[psutil.Process], *, seconds: float = 20) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def is_reachable_from_outside(process: psutil.Process) -> bool:
    listening = [c for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    return any(c.laddr.ip not in ("127.0.0.1", "::1") for c in listening)


def test_a_killed_engine_is_replaced_once_and_the_round_repeated(tokenizer: Any, open_sampler: Callable[..., Any]):
    policy = lively_policy(tokenizer)
    sampler = open_sampler(policy)
    asked = prompts(4)
    before = draw(sampler, asked)
    processes, folder = family(sampler.engine.pid), sampler.engine.folder
    assert not any(is_reachable_from_outside(process) for process in processes)
    os.kill(sampler.engine.pid, signal.SIGKILL)
    after = draw(sampler, asked)
    assert [c.response_ids.tolist() for c in after] == [c.response_ids.tolist() for c in before]
    assert are_gone(processes) and not folder.exists()

    processes, folder = family(sampler.engine.pid), sampler.engine.folder
    os.kill(sampler.engine.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"died a second time with the same weights .*SIGKILL.* lower sampler\.kv_gib"):
        draw(sampler, asked)
    assert are_gone(processes) and not folder.exists()
    sampler.close()


PARENT = """
import sys
sys.path[:0] = sys.argv[1:]
from engines import lively_policy
from epo.config import SamplerConfig
from epo.sampling.vllm import VllmSampler
from epo.training.tiny import build_tokenizer

policy = lively_policy(build_tokenizer(["You are in the kitchen.", "open the door"] * 4, vocabulary_size=300))
sampler = VllmSampler(policy, SamplerConfig(name="vllm", kv_gib=0.25), max_episodes=4)
print(sampler.engine.pid, sampler.engine.folder, flush=True)
sys.stdin.read()
"""


def test_a_killed_parent_takes_the_engine_with_it():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert parent.stdout is not None
    pid, folder = parent.stdout.readline().split()
    processes = family(int(pid))
    parent.kill()
    parent.communicate()
    assert are_gone(processes)
    deadline = time.monotonic() + 5
    while Path(folder).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(folder).exists()


def test_too_little_memory_for_keys_and_values_is_said(tokenizer: Any, open_sampler: Callable[..., VllmSampler]):
    with pytest.raises(UserError, match=r"does not start .* sampler\.kv_gib"):
        open_sampler(lively_policy(tokenizer), kv_gib=1e-5)


def test_an_engine_killed_while_it_starts_is_said(
    tokenizer: Any, open_sampler: Callable[..., VllmSampler], monkeypatch: pytest.MonkeyPatch
):
    call = _vllm_engine.Engine.call

    def killed(engine: Any, do: str, **fields: Any) -> Any:
        os.kill(engine.pid, signal.SIGKILL)
        return call(engine, do, **fields)

    monkeypatch.setattr(_vllm_engine.Engine, "call", killed)
    with pytest.raises(UserError, match=r"does not start .*ended by SIGKILL.*lower sampler\.kv_gib"):
        open_sampler(lively_policy(tokenizer))
