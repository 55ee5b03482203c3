"""Fixtures for training: a cache of the tests' own, minute runs in the corridor, made-up trajectories."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epo.config import Config
from epo.environments import register_suite
from epo.recipe import load_config

register_suite("failing", "failing_suite:FailingSuite")

MINUTE_RUN = (
    "name=minute",
    "steps=4",
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
    "rollout.tasks_per_step=4",
    "optimizer.learning_rate=0.001",
    "optimizer.minibatches=2",
    "evaluation.every=2",
    "evaluation.episodes=4",
    "evaluation.splits=[iid]",
    "checkpoint.every=3",
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Warm starts are shared between these tests and with nothing else."""
    monkeypatch.setenv("EPO_CACHE", str(cache))
    yield


@pytest.fixture(scope="session")
def minute_config() -> Callable[..., Config]:
    """`minute_config("steps=2", ...)`: four steps of four episodes in short corridors, with overrides."""

    def make(*overrides: str) -> Config:
        return load_config("base", [*MINUTE_RUN, *overrides])

    return make
