"""A run on a Ray cluster: the connection, and learner and collector on it."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
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

_ANSWER_SECONDS = 10.0


_TRAIN_PACKAGES = ("fsspec", "pandas", "pyarrow", "requests")
"""What Ray alone does not bring and Ray Train cannot be imported without."""


def require_ray(*, learners: int) -> None:
    """Looks without importing Ray, which reads the environment when it is imported.

    Raises:
        UserError: Ray is not installed, or not what a group of `learners` ranks needs of it.
    """
    if find_spec("ray") is None:
        raise UserError("--cluster needs Ray: pip install -e '.[cluster]', or leave the option out")
    missing = [name for name in _TRAIN_PACKAGES if find_spec(name) is None] if learners else []
    if missing:
        raise UserError(
            f"cluster.learners={learners} needs Ray Train, which lacks {', '.join(missing)}: "
            "pip install -e '.[cluster]', or set it to 0"
        )


class RayCluster:
    """The cluster that this process is connected to."""

    def __init__(self, config: Config, address: str, observer: Observer) -> None:
        self._config, self._address, self._observer = config, address, observer

    @classmethod
    @contextmanager
    def connected(cls, address: str, config: Config, observer: Observer) -> Iterator[RayCluster]:
        """Connect to the cluster at `address`, or for `local` start one on this machine's loopback, with a token.

        Raises:
            UserError: there is no cluster at that address.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {}
        if address == "local":
            # Read when Ray is imported: without it every server listens on all of the machine's addresses. The name is
            # from where it is the default.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            os.environ |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _loopback_interface())
            # Other users of this machine reach its loopback, too. Known to this run's processes only: Ray's own token
            # would be the same for every run, in a file. Kept where it is set, for who wants to use Ray's own tools.
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
            # Ray's workers would yield to everything else on the machine (19 is lowest, 15 its default).
            os.environ.setdefault("RAY_worker_niceness", "0")
            options["include_dashboard"] = False
            options["num_cpus"] = max(os.cpu_count() or 1, _cpus(config))  # shared where there are fewer cores
            if config.cluster.object_store_mb is not None:
                options["object_store_memory"] = config.cluster.object_store_mb * 1_000_000
        else:
            _require_answer(address)
        import ray

        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            if "InvalidAuthToken" in f"{error} {error.__cause__}":
                raise UserError(
                    f"--cluster {address}: the Ray cluster there asks for its token: set RAY_AUTH_MODE=token in the "
                    "environment, and copy ~/.ray/auth_token from its head"
                ) from None
            raise _no_cluster(address, error) from None
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
                group = LearnerGroup(config, model=model, start=first, events=events, is_local=self._address == "local")
                learner = stack.enter_context(closing(group))
                weights = learner.weights
            else:
                learner = Learner(policy, config, control_of(config), start_policy=start)
                weights = publisher(policy)
            self._observer.begin(f"start {cluster.workers} rollout workers", cluster.workers)
            collector = ClusterCollector(config, model=model, weights=weights, events=events)
            stack.enter_context(closing(collector))
            yield Parts(learner, collector, f"{config.sampler.name}, in {cluster.workers} rollout workers")


def _loopback_interface() -> str:
    """Its name; torch's collectives would take the one that this machine's name stands for."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


def _require_answer(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise _no_cluster(address, ValueError("not of the form HOST:PORT"))
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"--cluster {address}: no Ray cluster answers there ({reason}): give the address that `ray start --head` "
        "printed, such as 10.0.0.1:6379, or `local`"
    )


def _cpus(config: Config) -> int:
    """What all actors of a run ask for, rounded up."""
    cluster = config.cluster
    return math.ceil(cluster.workers * cluster.worker_cpus + cluster.learners * cluster.learner_cpus)
