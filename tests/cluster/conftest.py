"""A Ray cluster of two nodes on this machine, and minute runs in the corridor to put on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epo.config import Config
from epo.recipe import load_config

# Read when Ray is imported.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on the loopback
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - not below everything else here
os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112 - what others here need is not for Ray to judge

MINUTE_RUN = (
    "name=minute",
    "steps=3",
    "environment.suite=corridor",
    "environment.options={length: 3, choices: 2, tasks: 4}",
    "environment.workers=2",
    "environment.max_turns=4",
    "agent.format=action",
    "agent.max_response_tokens=6",
    "model.max_context=256",
    "model.device=cpu",
    "model.threads=1",
    "model.tiny={vocabulary_size: 320, hidden_size: 32, layers: 2, heads: 2, intermediate_size: 64}",
    "imitation.demonstrations=4",
    "imitation.batches=30",
    "imitation.batch_size=4",
    "imitation.learning_rate=0.005",
    "rollout.tasks_per_step=6",
    "optimizer.learning_rate=0.001",
    "optimizer.minibatches=2",
    "entropy.method=epo",
    "evaluation.every=0",
    "evaluation.episodes=2",
    "evaluation.splits=[iid]",
    "checkpoint.every=1",
    "logging.to=[]",
    "cluster={workers: 2, episodes_per_worker: 2, start_seconds: 240, learner_seconds: 240}",
)


@pytest.fixture(scope="session")
def minute_config() -> Callable[..., Config]:
    """`minute_config("steps=2", ...)`: three steps of six episodes in short corridors, with overrides."""

    def make(*overrides: str) -> Config:
        return load_config("base", [*MINUTE_RUN, *overrides])

    return make


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Warm starts are shared between these tests and with nothing else."""
    monkeypatch.setenv("EPO_CACHE", str(cache))
    yield


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes on the loopback, four logical cores and 100 MB of object store each."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 4, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    yield cluster.address
    cluster.shutdown()
