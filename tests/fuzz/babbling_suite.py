"""An environment that answers anything. Imported by name in worker processes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import fuzz_cases
import numpy as np

from epo.environments.base import TaskSuite, TextEnv
from epo.types import Observation, Step, Task


class Stranger:
    """Known to workers only."""

    def __float__(self) -> float:
        raise RuntimeError("no number")


class Words(str):
    """Known to workers only, and text."""

    __slots__ = ()


NUMBERS: list[Any] = [
    *fuzz_cases.NUMBERS, 0.5, -5.0, 3e38, 1e200, -1e200, 1.7e308, True, Decimal("1e5000"), Decimal("sNaN"),
    Fraction(1, 3), Fraction(10**400, 3), np.float32(0.5), np.float64("nan"), np.int64(2**62), np.array([0.5]),
    np.array([1.0, 2.0]), np.array([]), 1j, "1", b"1",
]  # fmt: skip
"""Of these and of those below, what is no number, no truth value or no list has to be refused."""
TRUTHS: list[Any] = [True, False, np.True_, np.False_, 0, 1, None, "yes", np.array([True, False]), 1.0]
LISTS: list[Any] = [
    [], ("go",), ["go"], [Words("go")], [""] * 500_000, ["go north"] * 60_000, ["a" * 99_999, "b", "c"], [None],
    ["go", 1], [b"go"], [["go"]], "go", {"go": 1}, {"go"}, range(3), iter(("go",)), np.array(["go"]), 7,
]  # fmt: skip


class BabblingEnv(TextEnv):
    """Right answers with hostile content mostly, and now and then answers of the wrong kind.

    Args:
        oddity: share of answers with something of another kind in them.
        huge: share of texts, and of lists where they are odd, that no prompt has room for.
        longest: characters of the other texts.
    """

    def __init__(self, *, oddity: float = 0.04, huge: float = 0.02, longest: int | None = None) -> None:
        self.oddity, self.huge, self.longest = oddity, huge, longest

    def reset(self, task: Task) -> Observation:
        self.rng = random.Random(repr(task.id))
        return self.wrong(Observation(text=self.text(), admissible_actions=self.actions(), goal=self.text()))

    def step(self, action: str) -> Step:
        rng = self.rng
        is_over = rng.random() < 0.2
        return self.wrong(
            Step(
                observation=Observation(text=self.text(), admissible_actions=self.actions()),
                reward=rng.choice([0.0, 1.0, -1.0, 1e30, float("nan"), float("inf")]) if rng.random() < 0.1 else 0.0,
                terminated=is_over,
                truncated=rng.random() < 0.02,
                success=is_over and rng.random() < 0.5,
                score=rng.choice([0.5, -5.0, float("nan"), 1e308]) if rng.random() < 0.1 else 0.0,
                understood=rng.random() < 0.5,
            )
        )

    def text(self) -> str:
        if self.rng.random() < self.huge:
            return "a huge room " * 100_000
        return fuzz_cases.text(self.rng)[: self.longest]

    def actions(self) -> tuple[str, ...] | None:
        rng = self.rng
        if rng.random() < 0.5:
            return None
        return tuple(fuzz_cases.text(rng, longest=20)[: self.longest] for _ in range(rng.randrange(4)))

    def wrong(self, answer: Any) -> Any:
        rng = self.rng
        if rng.random() >= self.oddity:
            return answer
        things: list[Any] = [
            None, 7, b"bytes", ["list"], {"text": "x"}, Stranger(), lambda: 0, float("nan"), (1, 2), Stranger,
            object(), Words("text"), 10**5000,
        ]  # fmt: skip
        if isinstance(answer, Step):
            fields = ["", "observation", "text", "admissible_actions", "reward", "score"]
            field = rng.choice([*fields, "terminated", "truncated", "success", "understood"])
        else:
            field = rng.choice(["", "text", "goal", "admissible_actions"])
        if field == "":
            return rng.choice(things)
        inside = isinstance(answer, Step) and field in ("text", "admissible_actions")
        kinds = {"reward": NUMBERS, "score": NUMBERS, "admissible_actions": LISTS}
        likely = kinds.get(field, things if field in ("observation", "text", "goal") else TRUTHS)
        thing = rng.choice(likely if rng.random() < 0.7 else things)
        if field == "admissible_actions" and isinstance(thing, list) and len(thing) > 1000 and rng.random() > self.huge:
            thing = thing[:1000]
        object.__setattr__(answer.observation if inside else answer, field, thing)
        return answer


class BabblingSuite(TaskSuite):
    name = "babbling"

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(suite=self.name, id=f"{split}/{n}", split=split, goal="any") for n in range(10)]

    def make_env(self) -> BabblingEnv:
        return BabblingEnv()
