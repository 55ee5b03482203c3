"""What the adapters share: tasks that are seeds, and a word on what is missing."""

from __future__ import annotations

import importlib
from typing import Any

from epo.errors import UserError
from epo.types import Task


def seeded_tasks(suite: str, *, goal: str, seed: int, train: int, iid: int, ood: int | None) -> dict[str, list[Task]]:
    """Tasks by split, numbered from `seed` on so that no seed is in two splits. `ood` None leaves that split out.

    Raises:
        UserError: a count below 1, or a negative seed.
    """
    counts = {"train": train, "iid": iid} | ({} if ood is None else {"ood": ood})
    for option, value, low in [*((split, count, 1) for split, count in counts.items()), ("seed", seed, 0)]:
        if value < low:
            raise UserError(f"suite {suite!r}: option {option!r} must be at least {low}, not {value}")
    tasks: dict[str, list[Task]] = {}
    for split, count in counts.items():
        tasks[split] = [
            Task(suite=suite, id=f"{split}/{number}", split=split, seed=number, goal=goal)
            for number in range(seed, seed + count)
        ]
        seed += count
    return tasks


def tasks_of(suite: str, tasks: dict[str, list[Task]], split: str) -> list[Task]:
    """The tasks of one split.

    Raises:
        UserError: unknown split.
    """
    if split not in tasks:
        raise UserError(f"suite {suite!r} has no split {split!r}; its splits: {', '.join(tasks)}")
    return tasks[split]


def require(module: str, *, extra: str) -> Any:
    """Import a library.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"the Python package {error.name!r} is not installed; pip install -e '.[{extra}]'") from None


def plain(action: str) -> str:
    """An action without what no library expects: lone surrogates, control characters, more than 1,000 characters."""
    return "".join(letter for letter in action[:1000] if letter.isprintable()).strip()
