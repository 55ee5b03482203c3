"""Episodes without rounds: each steps its environment as soon as its response is there.

The sampler draws for whatever episodes wait at the moment. So a slow environment holds up its own episode and no other,
and a long episode only itself. What an episode draws is a function of its seed, up to the rounding of batched products.
"""

from __future__ import annotations

import itertools
import queue
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from epo.cluster.weights import Weights
from epo.rollout import Episode, EpisodeSpec, RolloutCollector
from epo.types import StopReason, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One episode that somebody waits for."""

    spec: EpisodeSpec
    temperature: float
    alternatives: int
    weights: Weights | None = None
    """To be played with; None for whatever the policy has."""
    answer: Callable[[Trajectory | BaseException], None]
    """Called once, from the thread that plays: with the trajectory, or with what ended the service."""


class Inbox:
    """Where jobs arrive from other threads."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.wake, self._signal = socket.socketpair()
        """Readable when a job has arrived since the last `take`."""

    def put(self, job: Job) -> None:
        self._jobs.put(job)
        self._signal.send(b"\0")

    def take(self, *, block: bool) -> Job | None:
        """The next job; None when there is none and the caller would not wait."""
        try:
            job = self._jobs.get(block=block)
        except queue.Empty:
            return None
        self.wake.recv(1)  # one byte a job
        return job


class StreamingCollector(RolloutCollector):
    """A collector that is given episodes one by one and gives each back when it is over."""

    def serve(self, inbox: Inbox, *, episode_seconds: float, prepare: Callable[[Job], None]) -> None:
        """Play what arrives, as many episodes at once as the pool has slots, until an error ends it.

        Args:
            episode_seconds: after which an episode ends as lost to its environment, at its next turn.
            prepare: called before an episode begins; it may change the policy's weights.
        """
        numbers = itertools.count()
        live: dict[int, tuple[Job, Episode, float]] = {}
        try:
            while True:
                for slot in range(self._pool.size):
                    if slot not in live and (job := inbox.take(block=not live)) is not None:
                        prepare(job)
                        live[slot] = job, self._begin(slot, next(numbers), job.spec), time.monotonic() + episode_seconds
                wake = inbox.wake if len(live) < self._pool.size else None
                calls = self._pool.ready([e.pending for _, e, _ in live.values()], block=True, wake=wake)
                asking: dict[int, Episode] = {}
                for call, answer in zip(calls, self._pool.gather(calls), strict=True):
                    job, episode, due = live[call.slot]
                    if self._ends(episode, answer) or _is_late(episode, due, episode_seconds):
                        del live[call.slot]
                        job.answer(self._leave(call.slot, episode))
                    else:
                        asking[call.slot] = episode
                self._ask(asking, {slot: live[slot][0] for slot in asking})
        except BaseException as error:
            for job, _, _ in live.values():
                job.answer(error)
            while (job := inbox.take(block=False)) is not None:
                job.answer(error)
            raise

    def _ask(self, asking: dict[int, Episode], jobs: dict[int, Job]) -> None:
        """Draw a response for every episode that waits, and act on it."""
        alike: dict[tuple[float, int], dict[int, Any]] = defaultdict(dict)
        for slot, episode in asking.items():
            alike[jobs[slot].temperature, jobs[slot].alternatives][slot] = episode
        for (temperature, alternatives), episodes in alike.items():
            for slot, completion in self._respond(episodes, temperature=temperature, alternatives=alternatives):
                self._act(slot, episodes[slot], completion)


def _is_late(episode: Episode, due: float, episode_seconds: float) -> bool:
    if time.monotonic() < due:
        return False
    episode.trajectory.stop_reason = StopReason.ENVIRONMENT_ERROR
    episode.trajectory.error = f"it took longer than cluster.episode_seconds={episode_seconds:g}"
    return True
