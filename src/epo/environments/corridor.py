"""A corridor of coloured doors: an environment without dependencies, for learning and for tests.

The agent stands before a door, sees its colour, and must say the one of `choices` words that opens doors of this
colour. The goal states the rule. Only the end of the corridor pays, so a corridor is a long, sparse-reward task in
miniature, and its optimum and the luck of a random agent are known exactly::

    goal    Walk to the end of the corridor: push red doors, pull blue doors and slide green doors.
    text    You stand before a blue door. 3 doors are left.
    action  pull
    text    The blue door opens. You stand before a red door. 2 doors are left.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from math import comb
from typing import Any

from epo.environments.base import TaskSuite, TextEnv
from epo.errors import UserError
from epo.types import Observation, Step, Task

RULE = {
    "red": "push",
    "blue": "pull",
    "green": "slide",
    "yellow": "lift",
    "white": "turn",
    "black": "knock",
    "brown": "kick",
    "grey": "press",
}
"""What opens a door of which colour. A corridor with k choices uses the first k lines."""


class CorridorEnv(TextEnv):
    """Plays one corridor at a time. Deterministic: everything is written in the task's id."""

    def __init__(self, *, choices: int, strict: bool) -> None:
        self._rule = dict(list(RULE.items())[:choices])
        self._strict = strict
        self._doors: list[str] = []
        self._opened = 0
        self._over = True

    def reset(self, task: Task) -> Observation:
        self._doors, self._opened, self._over = doors_of(task, self._rule), 0, False
        rule = [f"{word} {colour} doors" for colour, word in self._rule.items()]
        goal = f"Walk to the end of the corridor: {', '.join(rule[:-1])} and {rule[-1]}."
        return Observation(text=self._view(), admissible_actions=tuple(self._rule.values()), goal=goal)

    def step(self, action: str) -> Step:
        if self._over:
            raise RuntimeError("the episode is over: call reset first")
        word, colour = action.strip().lower(), self._doors[self._opened]
        understood = word in self._rule.values()
        if not understood:
            text = f"Nothing happens. {self._view()}"
        elif word == self._rule[colour]:
            self._opened += 1
            self._over = self._opened == len(self._doors)
            text = f"The {colour} door opens. {self._view()}"
        elif self._strict:
            self._over = True
            text = f"The {colour} door locks for good. You have failed."
        else:
            text = f"The {colour} door stays shut. {self._view()}"
        success = self._opened == len(self._doors)
        return Step(
            observation=Observation(text=text, admissible_actions=() if self._over else tuple(self._rule.values())),
            reward=float(success),
            terminated=self._over,
            success=success,
            score=self._opened / len(self._doors),
            understood=understood,
        )

    def demonstration(self, task: Task) -> list[str]:
        return [self._rule[colour] for colour in doors_of(task, self._rule)]

    def _view(self) -> str:
        left = len(self._doors) - self._opened
        if left == 0:
            return "You are at the end of the corridor."
        count = "1 door is left" if left == 1 else f"{left} doors are left"
        return f"You stand before a {self._doors[self._opened]} door. {count}."


class CorridorSuite(TaskSuite):
    """Corridors drawn without repetition: `train` and `iid` of one length, `ood` of a length never trained on.

    Args:
        length: doors in a `train` or `iid` corridor; the optimal number of turns. At least 1.
        choices: words to choose from, as many as there are colours; 2 to 8.
        tasks: corridors in each split.
        ood_length: doors in an `ood` corridor; None is twice `length`.
        seed: which corridors are drawn.
        strict: a wrong word ends the episode as a failure instead of leaving the agent where it is.

    Raises:
        UserError: an option out of its range, or more tasks than there are different corridors.
    """

    name = "corridor"

    def __init__(
        self,
        *,
        length: int = 5,
        choices: int = 3,
        tasks: int = 64,
        ood_length: int | None = None,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        ood_length = 2 * length if ood_length is None else ood_length
        for option, value, high in [
            ("length", length, None),
            ("ood_length", ood_length, None),
            ("tasks", tasks, None),
            ("choices", choices, len(RULE)),
        ]:
            low = 2 if option == "choices" else 1
            if value < low or (high is not None and value > high):
                limit = f"at least {low}" if high is None else f"from {low} to {high}"
                raise UserError(f"suite 'corridor': option {option!r} must be {limit}, not {value}")
        if ood_length == length:
            raise UserError(f"suite 'corridor': option 'ood_length' must differ from 'length', which is {length} too")
        self._choices, self._strict = choices, strict
        seen = _draw(2 * tasks, length=length, choices=choices, seed=f"{seed}/seen")
        unseen = _draw(tasks, length=ood_length, choices=choices, seed=f"{seed}/ood")
        drawn = {"train": seen[:tasks], "iid": seen[tasks:], "ood": unseen}
        self._tasks = {split: [self._task(split, doors) for doors in corridors] for split, corridors in drawn.items()}
        self._options = {"length": length, "choices": choices, "tasks": tasks, "ood_length": ood_length, "seed": seed}

    def _task(self, split: str, doors: tuple[str, ...]) -> Task:
        return Task(suite=self.name, id=f"{split}/{'-'.join(doors)}", split=split, goal=f"{len(doors)}-doors")

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self._tasks:
            raise UserError(f"suite 'corridor' has no split {split!r}; its splits: {', '.join(self.splits)}")
        return self._tasks[split]

    def make_env(self) -> CorridorEnv:
        return CorridorEnv(choices=self._choices, strict=self._strict)

    def provenance(self) -> dict[str, Any]:
        return {**self._options, "strict": self._strict}

    def optimal_turns(self, task: Task) -> int:
        """The fewest turns to success: one per door."""
        return len(doors_of(task, RULE))

    def random_success(self, task: Task, *, max_turns: int) -> float:
        """Probability that uniformly random admissible actions reach the end within `max_turns` turns.

        With L doors and k words each turn opens a door with probability 1/k, independently of all others, so the doors
        opened in T turns are binomial and the answer is P(Binomial(T, 1/k) >= L). When strict, it is k^-L if T >= L.
        """
        doors, chance = self.optimal_turns(task), Fraction(1, self._choices)
        if self._strict:
            return float(chance**doors) if max_turns >= doors else 0.0
        tail = (comb(max_turns, n) * chance**n * (1 - chance) ** (max_turns - n) for n in range(doors, max_turns + 1))
        return float(sum(tail, start=Fraction(0)))


def doors_of(task: Task, colours: Sequence[str] | dict[str, str]) -> list[str]:
    """The colours of a task's doors, in order.

    Raises:
        UserError: the task is no corridor, or has colours outside `colours`.
    """
    doors = task.id.rpartition("/")[2].split("-")
    if task.suite != CorridorSuite.name or not set(doors) <= set(colours):
        raise UserError(f"task {task.id!r} of suite {task.suite!r} is not a corridor of {', '.join(colours)} doors")
    return doors


def _draw(count: int, *, length: int, choices: int, seed: str) -> list[tuple[str, ...]]:
    if count > choices**length:
        raise UserError(
            f"suite 'corridor': {choices} choices and length {length} make {choices**length} different corridors,"
            f" fewer than the {count} asked for; lower 'tasks' or raise the length"
        )
    rng, colours = random.Random(seed), list(RULE)[:choices]
    drawn: dict[tuple[str, ...], None] = {}
    while len(drawn) < count:
        drawn[tuple(rng.choices(colours, k=length))] = None
    return list(drawn)
