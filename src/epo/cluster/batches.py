"""Which episodes are wanted, which of them are back, and which is played next: the books of the collector.

A batch is what is collected together, the episodes of a step or of a panel. An episode is entered once, its trajectory
is taken once, and a batch is handed out whole, once.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from epo.rollout import EpisodeSpec
from epo.types import Trajectory

Key = tuple[EpisodeSpec, ...]


@dataclass(kw_only=True, slots=True, eq=False)
class Batch:
    """Episodes that are collected together."""

    specs: Key
    temperature: float
    alternatives: int
    max_staleness: int
    """Updates by which the weights of its tokens may be older than those of the moment when it is handed out."""
    waiting: deque[int] = field(default_factory=deque[int])
    """Places in `specs` of episodes that nobody plays."""
    found: dict[int, Trajectory] = field(default_factory=dict[int, Trajectory])
    losses: Counter[int] = field(default_factory=Counter[int])
    """How often an episode's worker was lost."""
    is_awaited: bool = False
    """Somebody waits for it, so it goes before those that are only expected."""

    @property
    def is_done(self) -> bool:
        return len(self.found) == len(self.specs)

    def finish(self, place: int, trajectory: Trajectory) -> None:
        """Enter a trajectory; never twice."""
        assert place not in self.found, f"episode {place} came twice"
        trajectory.restarts += self.losses[place]
        self.found[place] = trajectory


Entry = tuple[Batch, int]
"""An episode, as its place in a batch."""


class Batches:
    """Those that were not handed out yet, in the order in which they were entered."""

    def __init__(self) -> None:
        self._batches: dict[Key, Batch] = {}

    def enter(
        self, specs: Sequence[EpisodeSpec], *, temperature: float, alternatives: int, max_staleness: int
    ) -> Batch:
        """The batch of these episodes: a new one, unless it was entered before."""
        key = tuple(specs)
        batch = self._batches.get(key)
        if batch is None:
            batch = Batch(
                specs=key, temperature=temperature, alternatives=alternatives, max_staleness=max_staleness,
                waiting=deque(range(len(key))),
            )  # fmt: skip
            self._batches[key] = batch
        return batch

    def hand_out(self, batch: Batch, *, version: int) -> list[Trajectory]:
        """The trajectories of a batch that is done, in the order of its episodes; it is gone from here.

        Args:
            version: of the weights at the moment.

        Raises:
            RuntimeError: a token was drawn with older weights than the batch allows.
        """
        del self._batches[batch.specs]
        for place, trajectory in batch.found.items():
            for turn in trajectory.turns:
                if not 0 <= version - turn.policy_version <= batch.max_staleness:
                    raise RuntimeError(
                        f"episode {place} was drawn with weights {turn.policy_version}, not {version} or at most "
                        f"{batch.max_staleness} before it"
                    )
        return [batch.found[place] for place in range(len(batch.specs))]

    @property
    def are_done(self) -> bool:
        return all(batch.is_done for batch in self._batches.values())

    def next(self) -> Entry | None:
        """Takes out the episode to be played next: of batches that are awaited first, then in order."""
        ready = [batch for batch in self._batches.values() if batch.waiting]
        if not ready:
            return None
        batch = min(ready, key=lambda batch: not batch.is_awaited)
        return batch, batch.waiting.popleft()
