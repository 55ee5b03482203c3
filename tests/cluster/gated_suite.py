"""A corridor whose every step waits until a file is there. Imported by name in worker processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from epo.environments.base import TaskSuite, TextEnv
from epo.environments.corridor import CorridorSuite
from epo.types import Observation, Step, Task


class GatedEnv(TextEnv):
    def __init__(self, gates: Path, inner: TextEnv, tasks: Sequence[Task]) -> None:
        self._gates, self._inner, self._tasks = gates, inner, tasks
        self._gate = gates

    def reset(self, task: Task) -> Observation:
        self._gate = self._gates / str([t.id for t in self._tasks].index(task.id))
        return self._inner.reset(task)

    def step(self, action: str) -> Step:
        self._gate.with_suffix(".knock").touch()
        while not self._gate.exists():
            time.sleep(0.02)
        return self._inner.step(action)


class GatedSuite(TaskSuite):
    """Args:
    gates: folder whose file k lets the k-th task go on; in it k.knock says that somebody was before that gate.
    """

    name = "gated"

    def __init__(self, *, gates: Path) -> None:
        self._gates, self._corridor = Path(gates), CorridorSuite(length=3, choices=2, tasks=4, ood_length=4)

    def tasks(self, split: str) -> Sequence[Task]:
        return [*self._corridor.tasks(split), *self._corridor.tasks("ood")]

    def make_env(self) -> TextEnv:
        return GatedEnv(self._gates, self._corridor.make_env(), self.tasks("train"))
