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
from epo.cluster.weights import Files, Weights, packed, read_files, trained_tensors, write_files
from epo.config import Config
from epo.training.learner import Learner
from epo.training.model_directory import quiet_libraries
from epo.training.policy import load_policy
from epo.training.skipped import SkippedBatch
from epo.training.trainer import control_of
from epo.types import FloatArray, TrajectoryGroup

Notes: TypeAlias = "list[tuple[FloatArray | None, FloatArray | None]]"
"""Advantages and ratios of every turn of a step, in order."""


class Mailbox:
    """An actor where the driver leaves numbered calls for all ranks, and rank 0 the answers."""

    def __init__(self) -> None:
        self._calls: dict[int, Any] = {}
        self._answers: dict[int, Any] = {}
        self._news = asyncio.Condition()

    async def post(self, number: int, call: tuple[str, tuple[Any, ...]]) -> Any:
        """Leave a call; returns its answer."""
        async with self._news:
            self._calls = {number: call}
            self._news.notify_all()
            await self._news.wait_for(lambda: number in self._answers)
            return self._answers.pop(number)

    async def take(self, number: int) -> tuple[str, tuple[Any, ...]]:
        """The call of that number, as soon as it is there."""
        async with self._news:
            await self._news.wait_for(lambda: number in self._calls)
            return self._calls[number]

    async def answer(self, number: int, found: Any) -> None:
        async with self._news:
            self._answers[number] = found
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
    """Answers the driver's calls. Methods run on all ranks at once; what they return counts on rank 0."""

    def __init__(self, settings: RankSettings) -> None:
        config = settings.config
        quiet_libraries()
        torch.set_num_threads(config.model.threads or max(1, int(config.cluster.learner_cpus)))
        policy = _load(ray.get(settings.model), config)
        start = None if settings.start is None else _load(ray.get(settings.start), config)
        self._ranks = ShardedRanks(policy.device)
        self._learner = Learner(policy, config, control_of(config), start_policy=start, ranks=self._ranks)
        self._held: Any = None
        """Keeps the weights of the newest version in the object store."""

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

    def write(self) -> tuple[Files, dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            control = self._learner.write(Path(folder))
            return read_files(Path(folder)), control

    def read(self, files: Any, control: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_files(ray.get(files), Path(folder))
            self._learner.read(Path(folder), control)

    def _weights(self) -> Weights | None:
        policy = self._learner.policy
        tensors = {name: self._ranks.whole(tensor) for name, tensor in trained_tensors(policy).items()}
        if not self._ranks.writes:
            return None
        self._held = ray.put(packed(tensors))
        return Weights(policy.version, self._held)


def work(settings: RankSettings) -> None:
    """The training function of every rank, as Ray Train calls it."""
    rank = LearnerRank(settings)
    is_first = get_context().get_world_rank() == 0
    number = 0
    while True:
        method, arguments = ray.get(settings.mailbox.take.remote(number))
        if method == "stop":
            return
        found = getattr(rank, method)(*arguments)
        if is_first:
            ray.get(settings.mailbox.answer.remote(number, found))
        number += 1


def _load(files: Files, config: Config) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        write_files(files, Path(folder))
        return load_policy(folder, config.model)
