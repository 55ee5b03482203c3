"""Many environments at once, one worker process each, that survive the death of any of them.

The caller addresses slots 0..size-1. Work of different slots runs in parallel; what comes back depends on the tasks and
the actions only, never on timing or on the number of slots. Environments are deterministic, so a lost worker is
replaced by a new one into which the episode is replayed, and the caller notices nothing but the time it took::

    with EnvPool("corridor", {"length": 3}, size=2) as pool:
        first = pool.gather([pool.submit_reset(0, task), pool.submit_reset(1, other)])
        steps = pool.gather([pool.submit_step(0, "push"), pool.submit_step(1, "pull")])
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait as wait_readable
from socket import socket
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from epo.environments._processes import SessionMemory
from epo.environments._slot import Slot
from epo.environments._worker import Request, Worker
from epo.environments.registry import resolve_suite
from epo.errors import EnvironmentFailure, UserError
from epo.types import Observation, Step, Task

_CLOSE_SECONDS = 5.0  # what idle workers get to end by themselves

Result = TypeVar("Result")
Item = TypeVar("Item")
Reply = TypeVar("Reply", covariant=True)
Job = Generator[Request, Any, Result]


@dataclass(frozen=True, slots=True)
class Pending(Generic[Reply]):
    """A submitted call. `EnvPool.gather` turns it into its result, once."""

    slot: int
    number: int


class Transition(NamedTuple):
    """One exchange of a demonstration: what was read, what was done, what came of it."""

    observation: Observation
    action: str
    step: Step


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStats:
    """What went wrong since the pool was made, and what the workers hold now."""

    restarts: dict[str, int]
    """Workers replaced, by cause: `died`, `hung` (missed a deadline), `failed` (the environment raised)."""
    recycled: int
    """Workers replaced between episodes because they had grown beyond `worker_memory_mb`."""
    failures: int
    """Episodes given up, each of which ended with an `EnvironmentFailure`."""
    rss_bytes: list[int] | None
    """Resident memory per slot, descendants (a JVM) included; 0 without a worker. None where there is no /proc."""


class EnvPool:
    """A fixed number of environments of one suite, each in its own process. Not thread-safe.

    Worker processes start on first use. Each ends by itself when this process dies, however it dies.

    Args:
        suite_name: as for `make_suite`.
        options: the suite's options, plain data.
        size: number of slots.
        timeout_seconds: limit for one reset or step; a worker that exceeds it is replaced.
        slow_timeout_seconds: limit for starting a worker, for its first call, and for computing a demonstration.
        max_restarts: how often a worker is replaced within one episode before the episode is given up.
        worker_memory_mb: a worker that holds more, its descendants (a JVM) included, is replaced before its next
            episode; None for no limit. Needs /proc.

    Raises:
        UserError: unknown suite, or a size, timeout, restart count or memory out of range.
    """

    def __init__(
        self,
        suite_name: str,
        options: Mapping[str, Any] | None = None,
        *,
        size: int,
        timeout_seconds: float = 60.0,
        slow_timeout_seconds: float = 300.0,
        max_restarts: int = 2,
        worker_memory_mb: float | None = None,
    ) -> None:
        if size < 1:
            raise UserError(f"environment pool: size must be at least 1, not {size}")
        for name, seconds in [("timeout_seconds", timeout_seconds), ("slow_timeout_seconds", slow_timeout_seconds)]:
            if not seconds > 0:
                raise UserError(f"environment pool: {name} must be above 0, not {seconds}")
        if max_restarts < 0:
            raise UserError(f"environment pool: max_restarts must be at least 0, not {max_restarts}")
        if worker_memory_mb is not None and not worker_memory_mb > 0:
            raise UserError(f"environment pool: worker_memory_mb must be above 0, not {worker_memory_mb}")
        target = resolve_suite(suite_name)
        self._memory = SessionMemory()
        self._causes: Counter[str] = Counter()
        self._is_closed = False
        self._slots = [
            Slot(
                index=index,
                start_worker=partial(Worker, suite_name, target, dict(options or {}), send_seconds=timeout_seconds),
                timeout_seconds=timeout_seconds,
                slow_timeout_seconds=slow_timeout_seconds,
                max_restarts=max_restarts,
                memory=self._memory.of,
                memory_limit=float("inf") if worker_memory_mb is None else worker_memory_mb * 2**20,
                causes=self._causes,
            )
            for index in range(size)
        ]

    @property
    def size(self) -> int:
        """Number of slots."""
        return len(self._slots)

    def submit_reset(self, slot: int, task: Task) -> Pending[Observation]:
        """Begin the episode of `task` in a slot, whatever happened in it before. Returns at once."""
        return Pending(slot, self._submit(slot, Request("reset", task)))

    def submit_step(self, slot: int, action: str) -> Pending[Step]:
        """Do `action` in the slot's episode. Returns at once.

        Raises:
            RuntimeError: the slot has no episode: it was never reset, or its last result was an `EnvironmentFailure`.
        """
        return Pending(slot, self._submit(slot, Request("step", action)))

    def submit_demonstration(self, slot: int, task: Task) -> Pending[list[str] | None]:
        """Ask for an expert's actions. Ends the slot's episode: reset before the next step. Returns at once."""
        return Pending(slot, self._submit(slot, Request("demonstration", task)))

    def gather(self, pending: Sequence[Pending[Reply]]) -> list[Reply | EnvironmentFailure]:
        """Wait for submitted calls, of any slots and any kind; results in the order given.

        An episode that could not be kept alive yields an `EnvironmentFailure` as its result; the slot is ready for the
        next reset. Every wait has a deadline.

        Raises:
            UserError: the environment refused its options or the task.
            RuntimeError: a call was gathered already.
        """
        slots = [self._slots[call.slot] for call in pending]
        for slot, call in zip(slots, pending, strict=True):
            if slot.number != call.number or not (slot.is_busy or slot.has_outcome):
                raise RuntimeError(f"slot {slot.index}: this call was gathered already")
        while any(slot.is_busy for slot in slots):
            self._pump()
        return _results([slot.take() for slot in slots])

    def ready(
        self, pending: Sequence[Pending[Reply]], *, block: bool, wake: socket | None = None
    ) -> list[Pending[Reply]]:
        """Those of the submitted calls that `gather` would answer at once.

        Args:
            block: wait for the first of them.
            wake: ends the wait as soon as there is something to read from it.
        """
        self._pump(0.0)
        while not (answered := [call for call in pending if self._slots[call.slot].has_outcome]):
            if not block or not pending or self._pump(wake=wake):
                break
        return answered

    def wait(self, pending: Pending[Reply]) -> Reply | EnvironmentFailure:
        """`gather` for one call."""
        return self.gather([pending])[0]

    def restarts(self, slot: int) -> int:
        """How often the worker was replaced in the slot's current episode."""
        return self._slots[slot].restarts

    def map(
        self,
        job: Callable[[Item], Job[Result]],
        items: Sequence[Item],
        *,
        on_done: Callable[[int, int], None] | None = None,
    ) -> list[Result | EnvironmentFailure]:
        """Run one job per item over all slots, each free slot taking the next item; results in the order of items.

        A job is a generator that yields requests and is sent their results; it ends when its environment fails::

            def first_step(task: Task) -> Job[Step]:
                observation = yield Request("reset", task)
                return (yield Request("step", observation.admissible_actions[0]))

        Args:
            on_done: called with (jobs done, jobs in all) after every job.

        Raises:
            UserError: the environment refused its options or a task.
            RuntimeError: a slot has an unfinished call.
        """
        if any(slot.is_busy or slot.has_outcome for slot in self._slots):
            raise RuntimeError("map needs all slots: gather the submitted calls first")
        results: dict[int, Result | EnvironmentFailure] = {}
        waiting = deque(enumerate(items))
        running: dict[int, tuple[int, Job[Result]]] = {}

        def advance(slot: int, value: Any) -> None:
            number, generator = running[slot]
            try:
                if isinstance(value, EnvironmentFailure):
                    generator.close()
                    results[number] = value
                else:
                    self._submit(slot, generator.send(value))
                    return
            except StopIteration as stop:
                results[number] = stop.value
            del running[slot]
            if on_done is not None:
                on_done(len(results), len(items))

        try:
            while len(results) < len(items):
                for slot in range(self.size):
                    while waiting and slot not in running:
                        number, item = waiting.popleft()
                        running[slot] = (number, job(item))
                        advance(slot, None)
                self._pump()
                for slot in self._slots:
                    if slot.has_outcome:
                        advance(slot.index, *_results([slot.take()]))
        except BaseException:
            for slot in self._slots:
                if slot.is_busy or slot.has_outcome:
                    slot.discard()
            raise
        return [results[number] for number in range(len(items))]

    def demonstrate(
        self, tasks: Sequence[Task], *, on_done: Callable[[int, int], None] | None = None
    ) -> list[list[Transition] | EnvironmentFailure | None]:
        """Play the expert's actions for every task, up to the end of the episode.

        Returns:
            Per task the transitions, or None where there is no expert, or the failure. Whether the expert succeeded is
            in the last transition: `transitions[-1].step.success`.
        """
        return self.map(_demonstration, tasks, on_done=on_done)

    def stats(self) -> PoolStats:
        """Counters since the pool was made, and present memory."""
        is_known = self._memory.look()
        workers = [slot.worker for slot in self._slots]
        return PoolStats(
            restarts={cause: self._causes[cause] for cause in ("died", "hung", "failed")},
            recycled=self._causes["grown"],
            failures=self._causes["given up"],
            rss_bytes=[self._memory.of(w.pid) if w else 0 for w in workers] if is_known else None,
        )

    def close(self) -> None:
        """End all worker processes and their descendants. Idle ones may tidy up first. Safe to call twice."""
        self._is_closed = True
        leaving = [slot.worker for slot in self._slots if slot.ask_to_end() and slot.worker]
        deadline = time.monotonic() + _CLOSE_SECONDS
        while leaving and (seconds := deadline - time.monotonic()) > 0:
            readable = wait_readable([worker.socket for worker in leaving], seconds)
            leaving = [worker for worker in leaving if worker.socket not in readable]  # readable is: it has ended
        for slot in self._slots:
            slot.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, slot: int, request: Request) -> int:
        if self._is_closed:
            raise RuntimeError("the environment pool is closed")
        self._slots[slot].submit(request)
        return self._slots[slot].number

    def _pump(self, seconds: float | None = None, *, wake: socket | None = None) -> bool:
        """Wait until a busy slot has news or misses its deadline, and let it act. `seconds` at most, and no longer than
        `wake` has nothing to read; whether that has."""
        busy = {slot.worker.socket: slot for slot in self._slots if slot.is_busy and slot.worker}
        if not busy:
            return False
        due = max(0.0, min(slot.deadline for slot in busy.values()) - time.monotonic())
        watched = [*busy, wake] if wake is not None else list(busy)
        readable = wait_readable(watched, due if seconds is None else min(due, seconds))
        for connection, slot in busy.items():
            slot.advance(is_readable=connection in readable)
        return wake is not None and wake in readable


def _results(outcomes: list[Any]) -> list[Any]:
    for outcome in outcomes:
        if isinstance(outcome, UserError):
            raise outcome
    return outcomes


def _demonstration(task: Task) -> Job[list[Transition] | None]:
    actions: list[str] | None = yield Request("demonstration", task)
    if actions is None:
        return None
    observation: Observation = yield Request("reset", task)
    transitions: list[Transition] = []
    for action in actions:
        step: Step = yield Request("step", action)
        transitions.append(Transition(observation, action, step))
        if step.terminated or step.truncated:
            break
        observation = step.observation
    return transitions
