"""The environment contract: a suite lists tasks and makes environments; an environment plays one episode at a time.

A suite is described by a name and plain options, so that a worker process can build its own copy. Third parties add
suites through the entry-point group `epo.environments`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from epo.types import Observation, Step, Task


class TextEnv(ABC):
    """A text environment. Not thread-safe; lives in one process; reused for many episodes.

    Determinism: the same task and the same actions give the same observations, in any process.
    """

    @abstractmethod
    def reset(self, task: Task) -> Observation:
        """Start the episode of `task`. The returned observation carries the goal in words."""

    @abstractmethod
    def step(self, action: str) -> Step:
        """Do `action`. Any string is accepted; one that makes no sense is answered with `understood=False`.

        Raises:
            RuntimeError: no episode is under way: `reset` was not called since the last one ended.
        """

    def demonstration(self, task: Task) -> list[str] | None:
        """Actions of an expert that lead `task` to full success, or None where there is no expert.

        May use and disturb the environment: call `reset` afterwards.
        """
        return None

    def close(self) -> None:  # noqa: B027  (most environments hold nothing)
        """Free what the environment holds. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TaskSuite(ABC):
    """A family of tasks with fixed splits. Constructed from keyword options that are plain data."""

    name: str
    splits: tuple[str, ...] = ("train", "iid", "ood")
    library: tuple[str, str] | None = None
    """A module that must be installed and is imported late, and the extra of this package that brings it."""
    worker_mb: int = 10
    """MiB that a worker takes at least once it plays, with what it starts; more workers than the memory holds are
    refused. By default that of a Python process which has loaded nothing large."""

    @abstractmethod
    def tasks(self, split: str) -> Sequence[Task]:
        """All tasks of a split, in a fixed order.

        Raises:
            UserError: unknown split.
        """

    @abstractmethod
    def make_env(self) -> TextEnv:
        """A new environment. Called inside worker processes."""

    def prepare(self) -> None:  # noqa: B027  (most suites need nothing)
        """Do what is needed once, before workers start (generate games, check Java). Called in the main process.

        What takes long may be counted: an override that has the keyword parameter `progress` is given a function to
        call with (units done, units in all).

        Raises:
            UserError: something is missing; the message says how to get it.
        """

    def provenance(self) -> dict[str, Any]:
        """Versions and data hashes that decide what an episode looks like: plain data.

        A run does not resume where they differ from what it recorded. Left out of that are the keys `note` (words for
        people), `url` and `java` (what the suite runs on), and keys that only one of the two has.
        """
        return {}
