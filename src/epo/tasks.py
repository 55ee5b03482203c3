"""Which tasks, in which order: training tasks of every step and the fixed panels. All functions of the seed alone."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from epo.errors import UserError
from epo.types import Task


def balanced_order(tasks: Sequence[Task], *, seed: int, balance: Literal["goal", "task"]) -> list[Task]:
    """Every task once, in a seeded random order; with `goal` the task types take turns for as long as they last."""
    rng = random.Random(f"order/{seed}")
    if balance == "task":
        return rng.sample(list(tasks), len(tasks))
    piles: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        piles[task.goal].append(task)
    shuffled = [rng.sample(piles[goal], len(piles[goal])) for goal in sorted(piles)]
    depth = max((len(pile) for pile in shuffled), default=0)
    return [pile[i] for i in range(depth) for pile in shuffled if i < len(pile)]


class Curriculum:
    """An endless sequence of training tasks; step k takes the k-th stretch of it.

    A function of the seed and the position only, so a resumed run sees the tasks an uninterrupted one would have seen.
    With `goal` each task type runs through its own tasks in seeded cycles and the types take turns; with `task` there
    is one cycle over all tasks.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int, balance: Literal["goal", "task"]) -> None:
        if not tasks:
            raise UserError("the split 'train' has no tasks: loosen environment.options")
        piles: dict[str, list[Task]] = defaultdict(list)
        for task in tasks:
            piles[task.goal if balance == "goal" else ""].append(task)
        self._piles = [piles[goal] for goal in sorted(piles)]
        self._seed = seed

    def __getitem__(self, position: int) -> Task:
        pile_number = position % len(self._piles)
        cycle, place = divmod(position // len(self._piles), len(self._piles[pile_number]))
        pile = self._piles[pile_number]
        return random.Random(f"curriculum/{self._seed}/{pile_number}/{cycle}").sample(pile, len(pile))[place]

    def step_tasks(self, step: int, *, count: int) -> list[Task]:
        return [self[position] for position in range(step * count, (step + 1) * count)]


def panel(tasks: Sequence[Task], *, episodes: int, split: str) -> list[Task]:
    """The fixed list of evaluation tasks of a split, the same in every run whatever its seed.

    Task types take turns. No task comes twice, so that episodes are independent: a split with fewer tasks than
    `episodes` is played whole.
    """
    if not tasks:
        raise UserError(f"the split {split!r} has no tasks: remove it from evaluation.splits")
    order = balanced_order(tasks, seed=0, balance="goal")
    return order[:episodes]
