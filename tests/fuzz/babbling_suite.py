"""An environment that answers anything. Imported by name in worker processes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import fuzz_cases

from epo.environments.base import TaskSuite, TextEnv
from epo.types import Observation, Step, Task


class Stranger:
    """Known to workers only."""


class BabblingEnv(TextEnv):
    """Right answers with hostile content mostly, and now and then answers of the wrong kind."""

    def reset(self, task: Task) -> Observation:
        self.rng = random.Random(repr(task.id))
        self.turn = 0
        return self.wrong(Observation(text=self.text(), admissible_actions=self.actions(), goal=self.text()))

    def step(self, action: str) -> Step:
        rng = self.rng
        self.turn += 1
        is_over = rng.random() < 0.2
        return self.wrong(
            Step(
                observation=Observation(text=self.text(), admissible_actions=self.actions()),
                reward=rng.choice([0.0, 1.0, -1.0, 1e30, float("nan"), float("inf")]) if rng.random() < 0.1 else 0.0,
                terminated=is_over,
                success=is_over and rng.random() < 0.5,
                score=rng.choice([0.5, -5.0, float("nan"), 1e308]) if rng.random() < 0.1 else 0.0,
                understood=rng.random() < 0.5,
            )
        )

    def text(self) -> str:
        if self.rng.random() < 0.02:
            return "a huge room " * 100_000
        return fuzz_cases.text(self.rng)

    def actions(self) -> tuple[str, ...] | None:
        rng = self.rng
        return None if rng.random() < 0.5 else tuple(fuzz_cases.text(rng, longest=20) for _ in range(rng.randrange(4)))

    def wrong(self, answer: Any) -> Any:
        rng = self.rng
        if rng.random() > 0.04:
            return answer
        thing = rng.choice(
            [
                None,
                7,
                b"bytes",
                ["list"],
                {"text": "x"},
                Stranger(),
                lambda: 0,
                float("nan"),
                (1, 2),
                Stranger,
                object(),
            ]
        )
        if isinstance(answer, Step):
            field = rng.choice(["", "observation", "text", "reward", "score", "terminated", "success", "understood"])
        else:
            field = rng.choice(["", "text", "goal", "admissible_actions"])
        if field == "":
            return thing
        inner = answer.observation if isinstance(answer, Step) and field == "text" else answer
        object.__setattr__(inner, field, thing)
        return answer


class BabblingSuite(TaskSuite):
    name = "babbling"

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(suite=self.name, id=f"{split}/{n}", split=split, goal="any") for n in range(10)]

    def make_env(self) -> BabblingEnv:
        return BabblingEnv()
