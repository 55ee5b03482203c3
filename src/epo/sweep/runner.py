"""Runs a sweep's runs as processes of their own, as many at once as there are cores for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from epo.errors import UserError
from epo.sweep.folder import State, SweepFolder
from epo.sweep.plan import PlannedRun

_INTERRUPTED = 130
_POLL_SECONDS = 0.2


class SweepObserver(Protocol):
    """Who watches a sweep."""

    def changed(self, run: PlannedRun, what: str) -> None:
        """Something happened to `run`."""

    def tick(self, active: list[PlannedRun]) -> None:
        """Called a few times a second with the runs that are at work."""

    def note(self, text: str) -> None:
        """Something a person should read."""


@dataclass(slots=True)
class SweepRunner:
    """Works through `runs`: finished ones are left alone, unfinished ones go on from their last checkpoint.

    The first Ctrl-C (or SIGTERM) has every run stop after its current step with a checkpoint, the second one at once,
    and the third kills what is left.

    Args:
        parallel: runs at once.
        retry: also run those that failed before.
        lock: file descriptor of the folder's lock, which the runs keep open.
        program: the `epo` command.
    """

    folder: SweepFolder
    runs: list[PlannedRun]
    observer: SweepObserver
    parallel: int
    retry: bool
    lock: int
    program: tuple[str, ...] = (sys.executable, "-m", "epo")
    _active: dict[PlannedRun, subprocess.Popen[bytes]] = field(default_factory=dict)
    _signals: int = 0
    _passed_on: int = 0

    def work(self) -> bool:
        """Run what is to be run; False when it was interrupted. What failed is in the folder's `failures()`."""
        waiting = [run for run in self.runs if self._is_due(run)]
        waiting.reverse()
        with self._on_signals():
            try:
                while self._active or (waiting and not self._signals):
                    while waiting and not self._signals and len(self._active) < self.parallel:
                        self._start(waiting.pop())
                    time.sleep(_POLL_SECONDS)
                    self._pass_on_signals()
                    self._collect()
                    self.observer.tick(list(self._active))
            finally:
                for process in self._active.values():  # only after an error of ours
                    process.send_signal(signal.SIGINT)
        return not self._signals

    def _is_due(self, run: PlannedRun) -> bool:
        state = self.folder.state(run)
        if state is State.FINISHED:
            self.observer.changed(run, "was finished before")
        elif state is State.FAILED and not self.retry:
            self.observer.changed(run, f"failed before ({self.folder.failures()[run.name]}); --retry runs it again")
        else:
            return True
        return False

    def _start(self, run: PlannedRun) -> None:
        command = [*self.program, *self.folder.command(run)]
        self.folder.set_failure(run, None)
        with self.folder.open_log(run) as output:
            # A group of its own: Ctrl-C in the terminal reaches the runs through us, once.
            self._active[run] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
                pass_fds=(self.lock,),
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )
        self.observer.changed(run, "goes on" if "--resume" in command else "started")

    def _collect(self) -> None:
        for run, process in list(self._active.items()):
            code = process.poll()
            if code is None:
                continue
            del self._active[run]
            if self.folder.state(run) is State.FINISHED:
                self.observer.changed(run, "finished")
            elif self._signals or code == _INTERRUPTED:
                self.observer.changed(run, "stopped")
            else:
                reason = self.folder.halted(run) or f"exit code {code}: {self.folder.last_line(run)}"
                self.folder.set_failure(run, reason)
                self.observer.changed(run, f"failed, {reason} (more in {str(self.folder.log(run))!r})")

    def _pass_on_signals(self) -> None:
        while self._passed_on < self._signals:
            self._passed_on += 1
            for process in self._active.values():
                process.send_signal(signal.SIGINT if self._passed_on <= 2 else signal.SIGKILL)
            if self._passed_on == 1:
                self.observer.note("stopping after the current steps, with checkpoints (once more to stop at once)")

    @contextmanager
    def _on_signals(self) -> Iterator[None]:
        def handle(number: int, frame: FrameType | None) -> None:
            self._signals += 1

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def check_parallel(parallel: int | None, *, threads: int) -> int:
    """How many runs of `threads` threads at once; default: as many as the cores hold.

    Raises:
        UserError: more runs than cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if parallel is None:
        return max(1, cores // threads)
    if parallel > cores:
        raise UserError(f"--parallel {parallel} is more than the {cores} cores here: give {cores} or fewer")
    return parallel
