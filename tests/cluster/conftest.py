"""A Ray cluster of two nodes on this machine, and minute runs in the corridor to put on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from epo.config import Config
from epo.recipe import load_config
from minute_run import MINUTE_RUN, cache, own_cache  # noqa: F401  # fixtures

# Read when Ray is imported.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on the loopback
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - not below everything else here
os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112 - what others here need is not for Ray to judge

ON_RAY = (
    "steps=3",
    "model.threads=1",
    "rollout.tasks_per_step=6",
    "entropy.method=epo",
    "evaluation.every=0",
    "evaluation.episodes=2",
    "checkpoint.every=1",
    "logging.to=[]",
    "cluster={workers: 2, episodes_per_worker: 2, start_seconds: 240, learner_seconds: 240}",
)


@pytest.fixture(scope="session")
def minute_config() -> Callable[..., Config]:
    """`minute_config("steps=2", ...)`: three steps of six episodes in short corridors, with overrides."""

    def make(*overrides: str) -> Config:
        return load_config("base", [*MINUTE_RUN, *ON_RAY, *overrides])

    return make


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes on the loopback, four logical cores and 100 MB of object store each."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 4, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    yield cluster.address
    cluster.shutdown()
