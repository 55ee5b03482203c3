"""What both trainers of rl_step.py play: a game that takes no time and never ends, so every episode has every turn.

Imported by environment workers, so without torch.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import active_children
from os import sysconf
from pathlib import Path
from typing import Any

from epo.environments.base import TaskSuite, TextEnv
from epo.types import Observation, Step, Task

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
WORDS = "you see a table with a lamp and an old book on it and there is a small door in the wall behind the green chair"
GOAL = "Walk through the house and say in a few words what you do next."


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Everything that decides how much there is to do in one RL step."""

    model: str
    tasks: int = 4
    group: int = 4
    turns: int = 10
    response_tokens: int = 12
    observation_words: int = 32
    rows_per_pass: int = 4
    """Episodes in one forward and backward pass of the update."""
    max_context: int = 1024
    learning_rate: float = 1e-6
    threads: int = 2
    compute: str = "bfloat16"
    """Type of the matrix products over float32 weights."""

    @property
    def episodes(self) -> int:
        return self.tasks * self.group

    def save(self, folder: Path) -> None:
        (folder / "scenario.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Scenario:
        return cls(**json.loads((folder / "scenario.json").read_text(encoding="utf-8")))


class EndlessEnv(TextEnv):
    """Always answers with the same number of words. What an action earns is a number made from its letters."""

    def __init__(self, *, words: int) -> None:
        self._words = words
        self._colour = ""

    def reset(self, task: Task) -> Observation:
        self._colour = COLOURS[int(task.id) % len(COLOURS)]
        return Observation(text=self._view(), goal=GOAL)

    def step(self, action: str) -> Step:
        reward = zlib.crc32(action.encode()) % 101 / 100
        return Step(observation=Observation(text=self._view()), reward=reward, terminated=False)

    def _view(self) -> str:
        words = WORDS.split()
        rest = [words[place % len(words)] for place in range(self._words - 5)]
        return " ".join(["In", "the", self._colour, "room", "now", *rest])


class EndlessSuite(TaskSuite):
    name = "endless"

    def __init__(self, *, words: int) -> None:
        self._words = words

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(suite=self.name, id=str(number), split=split) for number in range(64)]

    def make_env(self) -> EndlessEnv:
        return EndlessEnv(words=self._words)


# What a worker of either trainer measures and says.


class Clock:
    """Marks of wall time and of CPU time, that of environment workers included."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def start(self) -> None:
        self._marks = [self._now()]

    def mark(self) -> None:
        self._marks.append(self._now())

    def between(self) -> dict[str, list[float]]:
        """Seconds between marks, as `wall` and `cpu`."""
        return {
            kind: [after[i] - before[i] for before, after in pairwise(self._marks)]
            for i, kind in enumerate(("wall", "cpu"))
        }

    @staticmethod
    def _now() -> tuple[float, float]:
        ticks = sum(
            sum(map(int, Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
            for child in active_children()
        )
        return time.perf_counter(), time.process_time() + ticks / sysconf("SC_CLK_TCK")


def wait_for_call() -> None:
    """Block until the comparing process asks for an RL step; end when it is gone."""
    if not sys.stdin.readline():
        sys.exit()


def answer(value: dict[str, Any]) -> None:
    sys.stdout.write("result " + json.dumps(value) + "\n")  # the libraries may print, too
    sys.stdout.flush()


def peak_bytes() -> int:
    """The largest resident set so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise LookupError("VmHWM")
