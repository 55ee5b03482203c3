"""A run on a Ray cluster: the connection, and learner and collector on it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from typing import Any

from epo.config import Config
from epo.errors import UserError
from epo.training.learner import Learner
from epo.training.policy import Policy
from epo.training.run_folder import RunFolder
from epo.training.session import Parts
from epo.training.trainer import Observer, control_of


def require_ray() -> None:
    """
    Raises:
        UserError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise UserError("--cluster needs Ray: pip install -e '.[cluster]', or leave the option out")


class RayCluster:
    """The cluster that this process is connected to."""

    def __init__(self, config: Config, address: str, observer: Observer) -> None:
        self._config, self._address, self._observer = config, address, observer

    @classmethod
    @contextmanager
    def connected(cls, address: str, config: Config, observer: Observer) -> Iterator[RayCluster]:
        """Connect to the cluster at `address`, or start one on this machine's loopback for `local`.

        Raises:
            UserError: there is no cluster at that address.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        options: dict[str, Any] = {}
        if address == "local":
            options["_node_ip_address"] = "127.0.0.1"
            options["include_dashboard"] = False
            options["num_cpus"] = max(os.cpu_count() or 1, _cpus(config))  # shared where there are fewer cores
            if config.cluster.object_store_mb is not None:
                options["object_store_memory"] = config.cluster.object_store_mb * 1_000_000
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--cluster {address}: no Ray cluster answers there ({reason}): give the address that `ray start "
                "--head` printed, such as 10.0.0.1:6379, or `local`"
            ) from None
        try:
            yield cls(config, address, observer)
        finally:
            ray.shutdown()

    def provenance(self) -> dict[str, Any]:
        import ray

        nodes = [
            {"address": node["NodeManagerAddress"], "cpus": node["Resources"].get("CPU", 0.0)}
            | {"gpus": node["Resources"].get("GPU", 0.0)}
            for node in ray.nodes()
            if node["Alive"]
        ]
        return {"cluster": {"address": self._address, "ray": ray.__version__, "nodes": nodes}}

    @contextmanager
    def parts(self, policy: Policy, start: Policy | None, run: RunFolder) -> Iterator[Parts]:
        from epo.cluster.events import EventLog
        from epo.cluster.rollouts import ClusterCollector
        from epo.cluster.weights import policy_files, publisher

        config, cluster = self._config, self._config.cluster
        events = EventLog(run.path / "cluster.jsonl", self._observer.note)
        model = policy_files(policy)
        with ExitStack() as stack:
            if cluster.learners:
                from epo.cluster.learner_group import LearnerGroup

                self._observer.begin(f"start {cluster.learners} learner ranks", cluster.learners)
                first = policy_files(start) if start not in (None, policy) and config.algorithm.kl_coefficient else None
                learner = stack.enter_context(closing(LearnerGroup(config, model=model, start=first, events=events)))
                weights = learner.weights
            else:
                learner = Learner(policy, config, control_of(config), start_policy=start)
                weights = publisher(policy)
            self._observer.begin(f"start {cluster.workers} rollout workers", cluster.workers)
            collector = ClusterCollector(config, model=model, weights=weights, events=events)
            stack.enter_context(closing(collector))
            yield Parts(learner, collector, f"{config.sampler.name}, in {cluster.workers} rollout workers")


def _cpus(config: Config) -> int:
    """What all actors of a run ask for, rounded up."""
    cluster = config.cluster
    return math.ceil(cluster.workers * cluster.worker_cpus + cluster.learners * cluster.learner_cpus)
