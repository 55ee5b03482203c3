"""One place in the pool: an environment that outlives its worker processes.

A slot holds the record of its episode. When a worker is lost, a new one gets the recorded calls again, one by one, each
under its own deadline, and must give the recorded answers; then the call that was lost is made again.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from epo.environments._worker import Answer, Lost, Request, Worker
from epo.errors import EnvironmentFailure, UserError
from epo.types import Observation, Step, Task

logger = logging.getLogger(__name__)

Outcome = Observation | Step | list[str] | EnvironmentFailure | UserError | None


@dataclass(kw_only=True, slots=True)
class Slot:
    """Idle, busy with a request (starting a worker, replaying, calling), or holding the outcome until it is taken."""

    index: int
    start_worker: Callable[[], Worker]
    timeout_seconds: float
    slow_timeout_seconds: float
    max_restarts: int
    memory: Callable[[int], int]
    """Bytes that a worker and its descendants hold, by its process id."""
    memory_limit: float
    """Bytes above which a worker is replaced before the next episode."""
    causes: Counter[str]
    """Restarts by cause, `grown` workers, and `given up` episodes; shared by all slots."""

    worker: Worker | None = None
    deadline: float = 0.0
    """By `time.monotonic()`; holds while busy."""
    restarts: int = 0
    """In the current episode."""
    number: int = 0
    """Of the last request; tells requests of one slot apart."""

    _request: Request | None = None
    _outcomes: list[Outcome] = field(default_factory=list[Outcome])
    """Empty or one; a list, because None is an outcome."""
    _history: list[tuple[Request, Outcome]] = field(default_factory=list[tuple[Request, Outcome]])
    """The episode so far: the reset, the steps, and what the environment answered to each."""
    _replayed: int = 0
    """How much of the history the present worker has seen."""
    _is_ready: bool = False
    _is_warm: bool = False
    """The present worker has answered a call. Environments may start their simulator only when first used."""
    _episodes: int = 0
    """Begun in the present worker."""

    @property
    def is_busy(self) -> bool:
        return self._request is not None

    @property
    def has_outcome(self) -> bool:
        return bool(self._outcomes)

    def submit(self, request: Request) -> None:
        """Begin a request. Returns at once; the outcome comes through `advance`.

        Raises:
            RuntimeError: the last outcome was not taken, or a step without an episode.
        """
        if self.is_busy or self.has_outcome:
            raise RuntimeError(f"slot {self.index}: gather the last call before the next one")
        if request.method != "step":
            self._history, self._replayed, self.restarts = [], 0, 0
            self._recycle_if_grown()
            self._episodes += 1
        elif not self._history:
            raise RuntimeError(f"slot {self.index} has no episode: reset it first")
        self._request = request
        self.number += 1
        if self.worker is None:
            self._start()
        elif self._is_ready:
            self._call_next()

    def take(self) -> Any:
        """The outcome of the last request: a result, an EnvironmentFailure, or a UserError that is to be raised."""
        return self._outcomes.pop()

    def advance(self, *, is_readable: bool) -> None:
        """Act on what the worker sent or, if it sent nothing and the deadline has passed, on its silence."""
        assert self.worker is not None
        answer = None
        if is_readable:
            try:
                answer = self.worker.receive()
            except Lost as error:
                self._recover("died", str(error))
                return
        if answer is not None:
            self._on_answer(*answer)
        elif time.monotonic() >= self.deadline:
            self._recover("hung", "no answer before the deadline")

    def ask_to_end(self) -> bool:
        """Ask an idle worker to tidy up and end. False when there is none that could."""
        if self.worker is None or self.is_busy:
            return False
        try:
            self.worker.send(None)
        except OSError:
            return False
        return True

    def discard(self) -> None:
        """Kill the worker and forget the episode."""
        if self.worker is not None:
            self.worker.kill()
        self.worker, self._is_ready, self._request = None, False, None
        self._history, self._replayed = [], 0
        self._outcomes.clear()

    def _recycle_if_grown(self) -> None:
        if self.worker is None or not self._is_warm or (held := self.memory(self.worker.pid)) <= self.memory_limit:
            return
        logger.warning(
            "environment worker %d (pid %d) holds %d MB after %d episodes, more than the %d MB it may "
            "(environment.worker_memory_mb): starting another",
            *(self.index, self.worker.pid, held >> 20, self._episodes, int(self.memory_limit) >> 20),
        )
        self.causes["grown"] += 1
        self.discard()

    def _start(self) -> None:
        self._is_ready, self._is_warm, self._replayed, self._episodes = False, False, 0, 0
        self.deadline = time.monotonic() + self.slow_timeout_seconds
        try:
            self.worker = self.start_worker()
        except OSError as error:
            self._recover("died", f"cannot start a process: {error}")

    def _call_next(self) -> None:
        """Send the next call of the replay, or, once the worker knows the whole episode, the one that is waited for."""
        assert self.worker is not None and self._request is not None
        is_replay = self._replayed < len(self._history)
        request = self._history[self._replayed][0] if is_replay else self._request
        is_slow = request.method == "demonstration" or not self._is_warm
        self.deadline = time.monotonic() + (self.slow_timeout_seconds if is_slow else self.timeout_seconds)
        try:
            self.worker.send(request)
        except OSError as error:
            self._recover("hung" if isinstance(error, TimeoutError) else "died", str(error))

    def _on_answer(self, kind: Answer, payload: Any) -> None:
        assert self._request is not None
        self._is_warm = kind is Answer.VALUE
        if kind is Answer.FAILURE:
            self._recover("failed", payload)
        elif kind is Answer.NONSENSE:  # as it would be again after a replay
            self._give_up(f"the environment broke its contract: {payload}")
        elif kind is Answer.USER_ERROR:
            self.discard()
            self._outcomes.append(UserError(payload))
        elif kind is Answer.READY:
            self._is_ready = True
            self._call_next()
        elif self._replayed < len(self._history):
            if payload != self._history[self._replayed][1]:
                self._give_up(
                    f"not deterministic: call {self._replayed} of the episode was answered otherwise in the replay"
                )
            else:
                self._replayed += 1
                self._call_next()
        else:
            if self._request.method != "demonstration":
                self._history.append((self._request, payload))
                self._replayed = len(self._history)
            self._request = None
            self._outcomes.append(payload)

    def _recover(self, cause: str, detail: str) -> None:
        """Replace the worker and begin the replay, or give the episode up when that was done often enough."""
        who, last_words = f"environment worker {self.index}", ""
        if self.worker is not None:
            who += f" (pid {self.worker.pid})"
            end, last_words = self.worker.kill()
            detail += f" ({end})" if cause == "died" else ""
            self.worker, self._is_ready = None, False
        if last_words:
            logger.warning("%s wrote at last:\n%s", who, last_words)
        if self.restarts >= self.max_restarts:
            self._give_up(f"{who} {cause}: {detail}; already replaced {self.restarts} times in this episode")
            return
        self.restarts += 1
        self.causes[cause] += 1
        logger.warning(
            "%s %s: %s; starting another (%d of %d for this episode) and replaying %d calls",
            *(who, cause, detail, self.restarts, self.max_restarts, len(self._history)),
        )
        self._start()

    def _give_up(self, reason: str) -> None:
        assert self._request is not None
        first = self._history[0][0] if self._history else self._request
        task = first.argument.id if isinstance(first.argument, Task) else first.argument
        logger.error("episode of task %s given up: %s", task, reason)
        self.causes["given up"] += 1
        self._history, self._replayed, self._request = [], 0, None
        self._outcomes.append(EnvironmentFailure(reason))
