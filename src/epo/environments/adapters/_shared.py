"""What the adapters share: suites whose tasks are seeds, a word on what is missing, and text made harmless."""

from __future__ import annotations

import importlib
import ipaddress
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from epo.environments.base import TaskSuite
from epo.errors import UserError
from epo.types import Task


class SeededSuite(TaskSuite):
    """A suite whose tasks are seeds, numbered from `seed` on so that no seed is in two splits.

    Args:
        goal: what reports group the tasks by.
        ood_options: None leaves the split `ood` out.

    Raises:
        UserError: a count below 1, or a negative seed.
    """

    def __init__(
        self,
        *,
        goal: str,
        seed: int,
        train: int,
        iid: int,
        ood: int,
        options: dict[str, Any] | None,
        ood_options: dict[str, Any] | None,
    ) -> None:
        counts = {"train": train, "iid": iid} | ({} if ood_options is None else {"ood": ood})
        for option, value, low in [*((split, count, 1) for split, count in counts.items()), ("seed", seed, 0)]:
            if value < low:
                raise UserError(f"suite {self.name!r}: option {option!r} must be at least {low}, not {value}")
        self._tasks: dict[str, list[Task]] = {}
        for split, count in counts.items():
            self._tasks[split] = [
                Task(suite=self.name, id=f"{split}/{number}", split=split, seed=number, goal=goal)
                for number in range(seed, seed + count)
            ]
            seed += count
        self.splits = tuple(self._tasks)
        self._options = {"train": options or {}, "iid": options or {}, "ood": ood_options or {}}
        """By split, whether it is there or not."""

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self._tasks:
            raise UserError(f"suite {self.name!r} has no split {split!r}; its splits: {', '.join(self._tasks)}")
        return self._tasks[split]


def require(module: str, *, extra: str) -> Any:
    """Import a library.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"the Python package {error.name!r} is not installed; pip install -e '.[{extra}]'") from None


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine's own interface."""
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def plain(action: str) -> str:
    """An action without what no library expects: lone surrogates, control characters, more than 1,000 characters."""
    return "".join(letter for letter in action[:1000] if letter.isprintable()).strip()


def encodable(text: str) -> str:
    """Text without lone surrogates, which JSON may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()


def brief(thing: object) -> str:
    """The first words of what somebody else said, on one line."""
    words = encodable(" ".join(str(thing).split()))
    return words if len(words) <= 200 else words[:200] + "..."
