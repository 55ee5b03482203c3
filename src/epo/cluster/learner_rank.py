"""One rank of the learner group: a process that Ray Train starts, and that does what the driver asks of all ranks."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import ray
import torch
from ray.train import get_context

from epo.cluster.sharding import ShardedRanks
from epo.cluster.weights import Weights, packed, read_files, write_files
from epo.config import Config
from epo.training.learner import Learner
from epo.training.model_directory import quiet_libraries
from epo.training.policy import Policy, load_policy, resumed_policy
from epo.training.skipped import SkippedBatch
from epo.training.trainer import control_of
from epo.types import FloatArray, TrajectoryGroup

Notes: TypeAlias = "list[tuple[FloatArray | None, FloatArray | None]]"
"""Advantages and ratios of every turn of a step, in order."""


class Mailbox:
    """An actor where the driver leaves numbered calls for all ranks, and ranks the answers."""

    def __init__(self) -> None:
        self._calls: dict[int, Any] = {}
        self._answers: dict[int, Any] = {}
        """Of the newest call, by rank."""
        self._news = asyncio.Condition()

    async def post(self, number: int, call: tuple[str, tuple[Any, ...]], *, answers: int) -> list[Any]:
        """Leave a call; returns so many answers, in the order of the ranks."""
        async with self._news:
            self._calls, self._answers = {number: call}, {}
            self._news.notify_all()
            await self._news.wait_for(lambda: len(self._answers) == answers)
            return [self._answers[rank] for rank in sorted(self._answers)]

    async def take(self, number: int) -> tuple[str, tuple[Any, ...]]:
        """The call of that number, as soon as it is there."""
        async with self._news:
            await self._news.wait_for(lambda: number in self._calls)
            return self._calls[number]

    async def answer(self, rank: int, found: Any) -> None:
        async with self._news:
            self._answers[rank] = found
            self._news.notify_all()


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSettings:
    """What every rank is started with."""

    config: Config
    model: Any
    """Reference to the files of the policy to go on with."""
    start: Any
    """Reference to those of the policy that training began with; None where it is the same."""
    mailbox: Any


class LearnerRank:
    """Answers the driver's calls. Methods run on all ranks at once; what they return counts on rank 0, but for those of
    `FROM_ALL`."""

    FROM_ALL = ("write",)

    def __init__(self, settings: RankSettings) -> None:
        config = settings.config
        quiet_libraries()
        torch.set_num_threads(config.model.threads or max(1, int(config.cluster.learner_cpus)))
        policy, start = _load(settings, config)
        self._ranks = ShardedRanks(policy.device)
        self._learner = Learner(policy, config, control_of(config), start_policy=start, ranks=self._ranks)
        self._held: dict[str, Any] = {}
        """Keeps what was answered last in the object store: the newest weights, and files."""

    def describe(self) -> dict[str, Any]:
        return {"reference": self._learner.reference_digest(), "weights": self._weights()}

    def rescore(self, groups: Any) -> list[TrajectoryGroup]:
        return list(self._learner.rescore(ray.get(groups)))

    def input_dependence(self, groups: Any, step: int) -> dict[str, float]:
        return self._learner.input_dependence(ray.get(groups), step=step)

    def update(
        self, groups: Any, step: int
    ) -> tuple[dict[str, float], Notes, list[SkippedBatch], Weights | None, dict[str, float]]:
        """Metrics, notes on the turns, what was skipped, the new weights and the seconds it took by phase."""
        found: Sequence[TrajectoryGroup] = ray.get(groups)
        metrics = self._learner.update(found, step=step)
        turns = [turn for group in found for t in group.trajectories for turn in t.turns]
        notes: Notes = [(turn.advantages, turn.ratios) for turn in turns]
        return metrics, notes, self._learner.skipped, self._weights(), self._learner.seconds()

    def write(self) -> tuple[Any, dict[str, Any]]:
        """Reference to the files that this rank wrote, and the control's state."""
        with tempfile.TemporaryDirectory() as folder:
            control = self._learner.write(Path(folder))
            self._held["files"] = ray.put(read_files(Path(folder)))
        return [self._held["files"]], control

    def read(self, files: dict[str, Any], control: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                write_files({name: ray.get(data)}, Path(folder))
            self._learner.read(Path(folder), control)

    def _weights(self) -> Weights | None:
        policy = self._learner.policy
        tensors = self._ranks.deal(policy.tensors(), among=1)
        if self._ranks.number > 0:
            return None
        self._held["weights"] = ray.put(packed(tensors))
        return Weights(policy.version, self._held["weights"])


def work(settings: RankSettings) -> None:
    """The training function of every rank, as Ray Train calls it."""
    rank = LearnerRank(settings)
    rank_number = get_context().get_world_rank()
    number = 0
    while True:
        method, arguments = ray.get(settings.mailbox.take.remote(number))
        if method == "stop":
            return
        found = getattr(rank, method)(*arguments)
        if rank_number == 0 or method in LearnerRank.FROM_ALL:
            ray.get(settings.mailbox.answer.remote(rank_number, found))
        number += 1


def _load(settings: RankSettings, config: Config) -> tuple[Policy, Policy | None]:
    """The policy to go on with, and the one that training began with, where that is another; adapters on one base."""
    with tempfile.TemporaryDirectory() as model, tempfile.TemporaryDirectory() as begun:
        write_files(ray.get(settings.model), Path(model))
        if settings.start is None:
            return load_policy(model, config.model), None
        write_files(ray.get(settings.start), Path(begun))
        return resumed_policy(Path(model), config.model, start=load_policy(begun, config.model))
