"""A rollout worker: an actor with an environment pool and a sampler, to which episodes are given one by one."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from epo.cluster.streaming import Inbox, Job, StreamingCollector
from epo.cluster.weights import Files, Weights, load_weights, write_files
from epo.config import Config
from epo.environments.pool import EnvPool
from epo.environments.registry import register_suite
from epo.rollout import EpisodeSpec
from epo.sampling.base import Sampler
from epo.training.model_directory import quiet_libraries
from epo.training.policy import Policy, load_policy
from epo.training.trainer import make_collector, make_sampler
from epo.types import Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """A worker's answer."""

    trajectory: Trajectory
    incidents: list[str]
    """What died in the worker and was mended since its last answer, in words."""


class RolloutWorker:
    """Plays each episode it is given to its end, all of them at once, up to `cluster.episodes_per_worker`.

    An episode stays with its worker, and so with the keys and values of its earlier turns.

    Args:
        target: what `resolve_suite` found for the configuration's suite.
        model: the files of the policy's directory.
    """

    def __init__(self, config: Config, target: str, model: Files) -> None:
        self._config, self._target = config, target
        self._model = model
        self._inbox = Inbox()

    async def start(self) -> str:
        """Get ready to play; to be called once. Returns where that is."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        # A thread of its own: the event loop stays free to take episodes while tokens are drawn.
        threading.Thread(target=self._work, args=(loop, ready), daemon=True).start()
        await ready
        return f"{ray.util.get_node_ip_address()}, pid {os.getpid()}"

    async def play(self, spec: EpisodeSpec, weights: Weights, *, temperature: float, alternatives: int) -> Played:
        """Play an episode with these weights, or newer ones that are there already."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Trajectory] = loop.create_future()

        def answer(found: Trajectory | BaseException) -> None:
            if isinstance(found, BaseException):
                loop.call_soon_threadsafe(future.set_exception, found)
            else:
                loop.call_soon_threadsafe(future.set_result, found)

        self._inbox.put(
            Job(spec=spec, temperature=temperature, alternatives=alternatives, weights=weights, answer=answer)
        )
        trajectory = await future
        return Played(trajectory=trajectory, incidents=self._sampler.incidents())

    def _work(self, loop: asyncio.AbstractEventLoop, ready: asyncio.Future[None]) -> None:
        """The thread that owns everything else: builds it, says so, and plays."""
        try:
            threads = self._config.model.threads or max(1, int(self._config.cluster.worker_cpus))
            torch.set_num_threads(threads)  # of this thread; others have their own number
            quiet_libraries()
            environment = self._config.environment
            register_suite(environment.suite, self._target)
            with tempfile.TemporaryDirectory() as folder:
                write_files(self._model, Path(folder))
                policy = load_policy(folder, self._config.model)
            pool = EnvPool(
                environment.suite,
                environment.options,
                size=self._config.cluster.episodes_per_worker,
                timeout_seconds=environment.timeout_seconds,
            )
            self._sampler = self._make_sampler(policy, pool)
            collector = make_collector(self._config, pool, policy, self._sampler, kind=StreamingCollector)
        except BaseException as error:
            loop.call_soon_threadsafe(ready.set_exception, error)
            raise
        loop.call_soon_threadsafe(ready.set_result, None)

        def prepare(job: Job) -> None:
            # Never back: with cluster.max_staleness an episode may have waited while newer weights came. Episodes that
            # are live go on with the new ones, and each of their turns says which drew it.
            if job.weights is not None and job.weights.version > policy.version:
                load_weights(policy, job.weights)

        collector.serve(self._inbox, episode_seconds=self._config.cluster.episode_seconds, prepare=prepare)

    def _make_sampler(self, policy: Policy, pool: EnvPool) -> Sampler:
        return make_sampler(self._config, policy, max_episodes=pool.size)
