"""The driver's side of rollout workers: hands out episodes one by one, and replaces workers that are lost.

Ray places the actors, moves the data and says who died. Here is only what is ours: which episode is where, that a
trajectory is taken once, and when to wait no longer.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError, RayTaskError

from epo.cluster.events import EventLog
from epo.cluster.rollout_worker import RolloutWorker
from epo.cluster.weights import Files, Weights
from epo.config import Config
from epo.environments.registry import resolve_suite
from epo.errors import LearnerLost, UserError
from epo.rollout import EpisodeSpec, RolloutTiming
from epo.types import StopReason, Trajectory


@dataclass(kw_only=True, slots=True)
class _Worker:
    number: int
    actor: Any
    starting: Any
    """Reference to the answer of `start`; None once it is there."""
    due: float
    """By `time.monotonic()`: when to wait for that no longer."""
    where: str = "not yet placed"
    playing: dict[Any, tuple[int, float]] = field(default_factory=dict[Any, tuple[int, float]])
    """Reference to the trajectory: number of the episode, and when to wait for it no longer."""
    replaces: float | None = None
    """When the worker before it was lost."""


class ClusterCollector:
    """Plays episodes on rollout workers, with the weights that the learner has when `collect` is called.

    Args:
        model: the files of the policy's directory.
        weights: gives the weights of the moment.
        worker_class: of the actors.

    Raises:
        UserError: the cluster has no room for the workers, or they do not start.
    """

    def __init__(
        self,
        config: Config,
        *,
        model: Files,
        weights: Callable[[], Weights],
        events: EventLog,
        worker_class: type[RolloutWorker] = RolloutWorker,
    ) -> None:
        self.timing = RolloutTiming()
        self.max_context = config.model.max_context
        self.max_response = config.agent.max_response_tokens
        self._config = config.cluster
        self._weights = weights
        self._events = events
        target = resolve_suite(config.environment.suite)
        options = {"num_cpus": self._config.worker_cpus, "num_gpus": self._config.worker_gpus}
        remote_class: Any = ray.remote(worker_class).options(scheduling_strategy="SPREAD", **options)
        arguments = (config, target, ray.put(model))
        self._make_actor: Callable[[], Any] = lambda: remote_class.remote(*arguments)
        self._failed_starts = 0
        """Since an episode was finished."""
        self._workers = [self._start(number) for number in range(self._config.workers)]
        while waiting := [worker for worker in self._workers if worker.starting is not None]:
            self._wait(waiting)

    def collect(
        self,
        specs: Sequence[EpisodeSpec],
        *,
        temperature: float,
        alternatives: int = 0,
        on_done: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """As `RolloutCollector.collect`. An episode whose worker is lost is played anew from its seed by another one;
        after `cluster.max_losses` of them it ends as lost to its environment.

        Raises:
            UserError: an environment or sampler refuses its settings, or no worker can be had any more.
            LearnerLost: the weights to play with are gone.
        """
        start, weights = time.perf_counter(), self._weights()
        found: dict[int, Trajectory] = {}
        waiting, losses = deque(range(len(specs))), Counter[int]()

        def finish(number: int, trajectory: Trajectory) -> None:
            assert number not in found, f"episode {number} came twice"
            trajectory.restarts += losses[number]
            found[number] = trajectory
            if on_done is not None:
                on_done(trajectory)

        while len(found) < len(specs):
            while waiting and (worker := self._least_busy()) is not None:
                number = waiting.popleft()
                reference = worker.actor.play.remote(
                    specs[number], weights, temperature=temperature, alternatives=alternatives
                )
                worker.playing[reference] = number, time.monotonic() + 2 * self._config.episode_seconds
            done, lost = self._wait(self._workers)
            for number, trajectory in done:
                versions = {turn.policy_version for turn in trajectory.turns} - {weights.version}
                if versions:
                    raise RuntimeError(f"episode {number} was drawn with weights {versions}, not {weights.version}")
                finish(number, trajectory)
            for number in lost:
                losses[number] += 1
                if losses[number] > self._config.max_losses:
                    error = f"its rollout worker was lost {losses[number]} times (cluster.max_losses)"
                    reason = StopReason.ENVIRONMENT_ERROR
                    finish(number, Trajectory(task=specs[number].task, stop_reason=reason, error=error))
                else:
                    waiting.appendleft(number)
        self.timing = RolloutTiming(workers=time.perf_counter() - start)
        return [found[number] for number in range(len(specs))]

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers = []

    # ---------------------------------------------------------------- workers

    def _start(self, number: int, *, replaces: float | None = None) -> _Worker:
        actor = self._make_actor()
        due = time.monotonic() + self._config.start_seconds
        return _Worker(number=number, actor=actor, starting=actor.start.remote(), due=due, replaces=replaces)

    def _least_busy(self) -> _Worker | None:
        """A worker that takes another episode."""
        able = [w for w in self._workers if w.starting is None and len(w.playing) < self._config.episodes_per_worker]
        return min(able, key=lambda worker: len(worker.playing), default=None)

    def _wait(self, workers: Sequence[_Worker]) -> tuple[list[tuple[int, Trajectory]], list[int]]:
        """Wait for news of `workers`; returns what is finished, and the episodes that were lost with their worker."""
        references = {r: w for w in workers for r in ([w.starting] if w.starting is not None else w.playing)}
        due = min(
            [w.due for w in workers if w.starting is not None] + [t for w in workers for _, t in w.playing.values()]
        )
        ready, _ = ray.wait(list(references), num_returns=1, timeout=max(0.0, due - time.monotonic()))
        done: list[tuple[int, Trajectory]] = []
        lost: list[int] = []
        for worker in {id(references[r]): references[r] for r in ready}.values():
            reason = self._take(worker, done)
            if reason is not None:
                lost += self._replace(worker, reason)
        now = time.monotonic()
        for worker in [w for w in self._workers if w in workers]:
            if worker.starting is not None and now >= worker.due:
                raise UserError(
                    f"rollout worker {worker.number} did not start within cluster.start_seconds="
                    f"{self._config.start_seconds:g}: lower cluster.workers={self._config.workers} or "
                    f"cluster.worker_cpus={self._config.worker_cpus:g} and worker_gpus={self._config.worker_gpus:g}, "
                    f"of which the cluster has {_resources()}"
                )
            if any(now >= due for _, due in worker.playing.values()):
                lost += self._replace(worker, f"nothing heard for {2 * self._config.episode_seconds:g} s")
        return done, sorted(lost, reverse=True)

    def _take(self, worker: _Worker, done: list[tuple[int, Trajectory]]) -> str | None:
        """Take in all that a worker has answered; returns why it is lost, if it is."""
        expected = [worker.starting] if worker.starting is not None else list(worker.playing)
        answered, _ = ray.wait(expected, num_returns=len(expected), timeout=0)
        reason = None
        for reference in answered:
            try:
                answer = ray.get(reference, timeout=self._config.start_seconds)
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise UserError(str(error.cause)) from None
                if isinstance(error.cause, ObjectLostError):  # the process that owned the weights is gone
                    raise LearnerLost(f"the weights are lost with the learner ({_line(error.cause)})") from None
                if not isinstance(error.cause, RayError):
                    raise
                reason = _line(error.cause)
            except (RayError, GetTimeoutError) as error:
                reason = _line(error)
            else:
                if worker.starting is not None:
                    worker.where, worker.starting = answer, None
                    self._say_started(worker)
                else:
                    number, _ = worker.playing.pop(reference)
                    done.append((number, answer))
                    self._failed_starts = 0
        return reason

    def _say_started(self, worker: _Worker) -> None:
        if worker.replaces is not None:
            seconds = time.monotonic() - worker.replaces
            self._events.add(
                f"rollout worker {worker.number} is back after {seconds:.1f} s ({worker.where})",
                event="worker_back", worker=worker.number, where=worker.where, seconds=round(seconds, 3),
            )  # fmt: skip

    def _replace(self, worker: _Worker, reason: str) -> list[int]:
        """Start another worker in its place; returns the episodes that were unfinished."""
        ray.kill(worker.actor)
        lost = sorted(number for number, _ in worker.playing.values())
        self._events.add(
            f"rollout worker {worker.number} ({worker.where}) is lost: {reason}; "
            f"{len(lost)} of its episodes are played again",
            event="worker_lost", worker=worker.number, where=worker.where, reason=reason, episodes=lost,
        )  # fmt: skip
        if worker.starting is not None:
            self._failed_starts += 1
            if self._failed_starts > self._config.max_losses * self._config.workers:
                raise UserError(f"rollout workers end as soon as they start ({reason}): see Ray's logs of the workers")
        since = worker.replaces if worker.starting is not None and worker.replaces else time.monotonic()
        self._workers[self._workers.index(worker)] = self._start(worker.number, replaces=since)
        return lost


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _resources() -> str:
    total = ray.cluster_resources()
    return f"{total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs"
