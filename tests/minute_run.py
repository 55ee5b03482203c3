"""Runs that take a minute: short corridors, a model made from nothing, and a cache of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

MINUTE_RUN = (
    "name=minute",
    "environment.suite=corridor",
    "environment.options={length: 3, choices: 2, tasks: 4}",
    "environment.workers=2",
    "environment.max_turns=4",
    "agent.format=action",
    "agent.max_response_tokens=6",
    "model.max_context=256",
    "model.device=cpu",
    "model.tiny={vocabulary_size: 320, hidden_size: 32, layers: 2, heads: 2, intermediate_size: 64}",
    "imitation.demonstrations=4",
    "imitation.batches=30",
    "imitation.batch_size=4",
    "imitation.learning_rate=0.005",
    "optimizer.learning_rate=0.001",
    "optimizer.minibatches=2",
    "evaluation.splits=[iid]",
)
"""Without the number of steps and of episodes."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Warm starts are shared between the tests of a folder and with nothing else."""
    monkeypatch.setenv("EPO_CACHE", str(cache))
    yield
