"""An engine that takes a request and never answers: the real process and protocol, around a vLLM that is made up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epo.config import SamplerConfig
from epo.errors import UserError
from epo.sampling import _vllm_engine
from epo.sampling._vllm_engine import Engine
from epo.sampling.base import Request
from epo.sampling.vllm import VllmSampler
from epo.training.policy import Policy

MADE_UP = """
import os, signal, time

class SamplingParams:
    def __init__(self, **settings): pass

class LLM:
    def __init__(self, **settings):
        if os.environ["STUCK_AT"] == "start": time.sleep(1000)
    def collective_rpc(self, method, kwargs): pass
    def reset_prefix_cache(self): return True
    def generate(self, prompts, asked, use_tqdm):
        # Stopped, none of its threads sees that the connection was closed.
        os.kill(os.getpid(), signal.SIGSTOP) if os.environ["STUCK_AT"] == "stopped" else time.sleep(1000)
"""


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Path]]:
    """Puts the made-up vLLM in place; collects process ids and folders of the engines. Only starting may take long."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text(MADE_UP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(":"))
    found: list[tuple[int, Path]] = []
    call = Engine.call

    def impatient(engine: Engine, do: str, **fields: Any) -> dict[str, Any]:
        if do == "start":
            found.append((engine.pid, engine.folder))
        is_slow = do == "start" and os.environ["STUCK_AT"] != "start"
        monkeypatch.setattr(_vllm_engine, "ANSWER_SECONDS", 120.0 if is_slow else 1.5)
        return call(engine, do, **fields)

    monkeypatch.setattr(Engine, "call", impatient)
    return found


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["asleep", "stopped"])
def test_an_engine_that_never_answers_ends_like_one_that_died(
    how: str, started: list[tuple[int, Path]], make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STUCK_AT", how)
    sampler = VllmSampler(make_policy(), SamplerConfig(name="vllm"), max_episodes=1)
    asked = Request(episode=0, prompt_ids=[1, 2, 3], random=np.random.default_rng(0))
    begin = time.monotonic()
    with pytest.raises(UserError) as refused:
        sampler.generate([asked], temperature=1.0, train_temperature=1.0, max_tokens=4)
    assert time.monotonic() - begin < 60
    for part in ("no answer to 'score' within 1.5 s", "agent.max_response_tokens", "sampler.name=local"):
        assert part in str(refused.value)
    (incident,) = sampler.incidents()
    assert "no answer to 'score' within 1.5 s" in incident and "started again" in incident
    assert len(started) == 2
    assert not any(is_alive(pid) or folder.exists() for pid, folder in started)
    sampler.close()


def test_an_engine_that_never_starts_is_said(
    started: list[tuple[int, Path]], make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STUCK_AT", "start")
    with pytest.raises(UserError, match=r"does not start \(no answer to 'start' within 1\.5 s.*docs/vllm\.md"):
        VllmSampler(make_policy(), SamplerConfig(name="vllm"), max_episodes=1)
    ((pid, folder),) = started
    assert not is_alive(pid) and not folder.exists()
