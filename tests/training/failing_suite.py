"""A corridor whose environments die on demand. Imported by name in worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from epo.environments.base import TaskSuite, TextEnv
from epo.environments.corridor import CorridorEnv, CorridorSuite
from epo.types import Observation, Step, Task


class FailingEnv(TextEnv):
    def __init__(self, suite: FailingSuite, inner: CorridorEnv) -> None:
        self.suite, self.inner, self.steps = suite, inner, 0

    def reset(self, task: Task) -> Observation:
        self.steps = 0
        return self.inner.reset(task)

    def step(self, action: str) -> Step:
        self.steps += 1
        done = self.suite.log.read_text().count("x")
        if self.steps == self.suite.at and done < self.suite.kills:
            self.suite.log.write_text("x" * (done + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner.step(action)

    def demonstration(self, task: Task) -> list[str]:
        return self.inner.demonstration(task)


class FailingSuite(TaskSuite):
    """Kills its worker at the `at`-th step of an episode, `kills` times in all."""

    name = "failing"

    def __init__(self, *, log: Path, at: int = 2, kills: int = 1) -> None:
        self.log, self.at, self.kills = Path(log), at, kills
        self.log.touch()
        self.inner = CorridorSuite(length=3, choices=2, tasks=4)

    def tasks(self, split: str) -> Sequence[Task]:
        return self.inner.tasks(split)

    def make_env(self) -> FailingEnv:
        return FailingEnv(self, self.inner.make_env())
