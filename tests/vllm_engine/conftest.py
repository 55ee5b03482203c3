"""Fixtures for the vLLM sampler: real engines on minute models. Collected only where vLLM is installed.

The folder is not called `vllm`, which would hide that package from `importlib.util.find_spec` where it is missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import lively_policy

from epo.config import SamplerConfig
from epo.sampling.vllm import VllmSampler
from epo.training.policy import Policy

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

# In fp32 the two agree to 1e-5 on these models.
TIGHT = {"kv_gib": 0.25, "max_weight_error": 1e-3}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starting an engine takes half a minute on a core of its own, and several on a busy one."""
    for item in items:  # whatever else is collected in the same run is here, too
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def open_sampler() -> Iterator[Callable[..., VllmSampler]]:
    """`open_sampler(policy, kv_gib=...)`: closed after the test."""
    opened: list[VllmSampler] = []

    def make(policy: Policy, **options: Any) -> VllmSampler:
        config = SamplerConfig.model_validate({"name": "vllm", **TIGHT, **options})
        opened.append(VllmSampler(policy, config, max_episodes=8))
        return opened[-1]

    yield make
    for sampler in opened:
        sampler.close()


@pytest.fixture(scope="session")
def shared(tokenizer: Any) -> Iterator[tuple[Policy, VllmSampler]]:
    """A lively tied policy and its sampler, for all tests that leave the engine alive. Weights may be changed."""
    policy = lively_policy(tokenizer)
    sampler = VllmSampler(policy, SamplerConfig.model_validate({"name": "vllm", **TIGHT}), max_episodes=8)
    yield policy, sampler
    sampler.close()
