"""The driver's side of rollout workers: hands out episodes one by one, and replaces workers that are lost.

Ray places the actors, moves the data and says who died. Here is only what is ours: which episode is where, and when to
wait no longer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError, RayTaskError

from epo.cluster.batches import Batch, Batches, Entry
from epo.cluster.events import EventLog
from epo.cluster.rollout_worker import RolloutWorker
from epo.cluster.weights import Files, Weights
from epo.config import Config
from epo.environments.registry import resolve_suite
from epo.errors import LearnerLost, UserError
from epo.rollout import EpisodeSpec, RolloutTiming
from epo.types import StopReason, Trajectory

_POLL_SECONDS = 0.1
"""How often to look whether new episodes are wanted while others are waited for."""


@dataclass(kw_only=True, slots=True)
class _Worker:
    number: int
    actor: Any
    starting: Any
    """Reference to the answer of `start`; None once it is there."""
    due: float
    """By `time.monotonic()`: when to wait for that no longer."""
    where: str = "not yet placed"
    playing: dict[Any, tuple[Entry, float]] = field(default_factory=dict[Any, tuple[Entry, float]])
    """Reference to the trajectory: which episode it is, and when to wait for it no longer."""
    replaces: float | None = None
    """When the worker before it was lost."""


class ClusterCollector:
    """Plays episodes on rollout workers, with the weights that the learner has when an episode begins.

    A thread of its own hands them out, so that they go on while the caller updates the learner. The weights of the
    moment are asked for in `expect` and `collect` only, when the caller is not changing them.

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
        self._news = threading.Condition()
        """Held by whoever reads or changes what follows."""
        self._batches = Batches()
        self._newest = weights()
        self._error: BaseException | None = None
        """What ended the thread."""
        self._is_closing = False
        self._thread = threading.Thread(target=self._play, daemon=True)
        self._thread.start()

    def expect(self, specs: Sequence[EpisodeSpec], *, temperature: float, alternatives: int = 0) -> None:
        """As `TrainingCollector.expect`: begins them when nothing that is waited for is left to begin."""
        staleness = self._config.max_staleness
        self._enter(specs, temperature=temperature, alternatives=alternatives, max_staleness=staleness)

    def collect(
        self,
        specs: Sequence[EpisodeSpec],
        *,
        temperature: float,
        alternatives: int = 0,
        on_done: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """As `RolloutCollector.collect`. Tokens were drawn with the weights of the moment, or, of episodes that were
        expected, with ones at most `cluster.max_staleness` updates older. An episode whose worker is lost is played
        anew from its seed by another one; after `cluster.max_losses` of them it ends as lost to its environment.

        Raises:
            UserError: an environment or sampler refuses its settings, or no worker can be had any more.
            LearnerLost: the weights to play with are gone.
        """
        start = time.perf_counter()
        batch = self._enter(specs, is_awaited=True, temperature=temperature, alternatives=alternatives, max_staleness=0)
        told = 0
        while told < len(specs):
            for trajectory in self._found_since(batch, told):
                told += 1
                if on_done is not None:
                    on_done(trajectory)
            self._events.tell()
        self.timing = RolloutTiming(workers=time.perf_counter() - start)
        with self._news:
            return self._batches.hand_out(batch, version=self._newest.version)

    def close(self) -> None:
        """End all workers."""
        with self._news:
            self._is_closing = True
            self._news.notify_all()
        self._thread.join(timeout=10.0)
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers = []
        self._events.tell()

    # ---------------------------------------------------------------- episodes

    def _enter(self, specs: Sequence[EpisodeSpec], *, is_awaited: bool = False, **how: Any) -> Batch:
        newest = self._weights()
        with self._news:
            self._newest = newest
            batch = self._batches.enter(specs, **how)
            batch.is_awaited = is_awaited
            self._news.notify_all()
        return batch

    def _found_since(self, batch: Batch, count: int) -> list[Trajectory]:
        """Waits until more than `count` trajectories of a batch are back, or something is to be said; returns those
        after that many."""

        def is_news() -> bool:
            return self._error is not None or len(batch.found) > count or self._events.has_untold

        with self._news:
            self._news.wait_for(is_news)
            if self._error is not None:
                self._events.tell()
                raise self._error
            return list(batch.found.values())[count:]

    def _play(self) -> None:
        """The thread: gives episodes out and takes trajectories in for as long as any are wanted."""
        try:
            while True:
                with self._news:
                    self._news.wait_for(lambda: self._is_closing or not self._batches.are_done)
                    if self._is_closing:
                        return
                    self._give_out()
                done, lost = self._wait(self._workers)
                with self._news:
                    for (batch, place), trajectory in done:
                        batch.finish(place, trajectory)
                    for batch, place in lost:
                        self._lose(batch, place)
                    self._news.notify_all()
        except BaseException as error:
            with self._news:
                self._error = error
                self._news.notify_all()

    def _give_out(self) -> None:
        """Begin episodes for as long as a worker takes more of them."""
        while (worker := self._least_busy()) is not None and (episode := self._batches.next()) is not None:
            batch, place = episode
            reference = worker.actor.play.remote(
                batch.specs[place], self._newest, temperature=batch.temperature, alternatives=batch.alternatives
            )
            worker.playing[reference] = episode, time.monotonic() + 2 * self._config.episode_seconds

    def _lose(self, batch: Batch, place: int) -> None:
        batch.losses[place] += 1
        if batch.losses[place] <= self._config.max_losses:
            batch.waiting.appendleft(place)
            return
        error = f"its rollout worker was lost {batch.losses[place]} times (cluster.max_losses)"
        reason = StopReason.ENVIRONMENT_ERROR
        batch.finish(place, Trajectory(task=batch.specs[place].task, stop_reason=reason, error=error))

    # ---------------------------------------------------------------- workers

    def _start(self, number: int, *, replaces: float | None = None) -> _Worker:
        actor = self._make_actor()
        due = time.monotonic() + self._config.start_seconds
        return _Worker(number=number, actor=actor, starting=actor.start.remote(), due=due, replaces=replaces)

    def _least_busy(self) -> _Worker | None:
        """A worker that takes another episode."""
        able = [w for w in self._workers if w.starting is None and len(w.playing) < self._config.episodes_per_worker]
        return min(able, key=lambda worker: len(worker.playing), default=None)

    def _wait(self, workers: Sequence[_Worker]) -> tuple[list[tuple[Entry, Trajectory]], list[Entry]]:
        """Wait a moment for news of `workers`; returns what is finished, and the episodes that were lost with their
        worker, the last of them first."""
        references = {r: w for w in workers for r in ([w.starting] if w.starting is not None else w.playing)}
        due = min(
            [w.due for w in workers if w.starting is not None] + [t for w in workers for _, t in w.playing.values()]
        )
        ready, _ = ray.wait(
            list(references), num_returns=1, timeout=min(_POLL_SECONDS, max(0.0, due - time.monotonic()))
        )
        done: list[tuple[Entry, Trajectory]] = []
        lost: list[Entry] = []
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
        return done, lost[::-1]

    def _take(self, worker: _Worker, done: list[tuple[Entry, Trajectory]]) -> str | None:
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
                    text = f"the weights are lost with the learner ({_line(error.cause)})"
                    self._events.add(text, event="learner_lost", during="play", reason=_line(error.cause))
                    raise LearnerLost(text) from None
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
                    episode, _ = worker.playing.pop(reference)
                    done.append((episode, answer.trajectory))
                    self._failed_starts = 0
                    for incident in answer.incidents:
                        self._events.add(
                            f"rollout worker {worker.number} ({worker.where}): {incident}",
                            event="worker_mended", worker=worker.number, where=worker.where, reason=incident,
                        )  # fmt: skip
        return reason

    def _say_started(self, worker: _Worker) -> None:
        if worker.replaces is not None:
            seconds = time.monotonic() - worker.replaces
            self._events.add(
                f"rollout worker {worker.number} is back after {seconds:.1f} s ({worker.where})",
                event="worker_back", worker=worker.number, where=worker.where, seconds=round(seconds, 3),
            )  # fmt: skip

    def _replace(self, worker: _Worker, reason: str) -> list[Entry]:
        """Start another worker in its place; returns the episodes that were unfinished."""
        ray.kill(worker.actor)
        lost = [episode for episode, _ in worker.playing.values()]
        self._events.add(
            f"rollout worker {worker.number} ({worker.where}) is lost: {reason}; "
            f"{len(lost)} of its episodes are played again",
            event="worker_lost", worker=worker.number, where=worker.where, reason=reason,
            episodes=[list(batch.specs[place].seed) for batch, place in lost],
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
