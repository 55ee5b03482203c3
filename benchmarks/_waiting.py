"""An environment and a sampler that only wait: what is measured is who waits for whom. Imported by worker processes."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np

from epo.environments.base import TaskSuite, TextEnv
from epo.sampling.base import Completion, Request, Sampler
from epo.training.policy import Policy
from epo.types import Observation, Step, Task

LOW, HIGH, TAIL = 0.05, 0.5, 1.2
"""Seconds of a step: Pareto with this exponent from LOW on, at most HIGH."""


def latency(task: Task, turn: int) -> float:
    """The same in every run."""
    return min(HIGH, LOW * random.Random(f"{task.id}/{turn}").paretovariate(TAIL))


class WaitingEnv(TextEnv):
    def __init__(self, turns: int) -> None:
        self._turns = turns
        self._task, self._turn = Task(suite="waiting", id="", split="train"), 0

    def reset(self, task: Task) -> Observation:
        self._task, self._turn = task, 0
        return Observation(text="Wait.", goal="Wait until it is over.")

    def step(self, action: str) -> Step:
        time.sleep(latency(self._task, self._turn))
        self._turn += 1
        return Step(observation=Observation(text="Wait."), reward=0.0, terminated=self._turn == self._turns)


class WaitingSuite(TaskSuite):
    name = "waiting"

    def __init__(self, *, turns: int, tasks: int) -> None:
        self._turns, self._count = turns, tasks

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(suite=self.name, id=f"{split}/{number}", split=split) for number in range(self._count)]

    def make_env(self) -> TextEnv:
        return WaitingEnv(self._turns)


class WaitingSampler(Sampler):
    """Says the same to everything, after `seconds` for a batch of whatever size."""

    def __init__(self, policy: Policy, *, seconds: float) -> None:
        self._policy, self._seconds = policy, seconds
        self._ids = np.array(policy.chat.response_ids("wait"), dtype=np.int64)

    def generate(
        self,
        requests: Sequence[Request],
        *,
        temperature: float,
        train_temperature: float,
        max_tokens: int,
        alternatives: int = 0,
    ) -> list[Completion]:
        if self._seconds:
            time.sleep(self._seconds)
        nothing = np.zeros(len(self._ids), dtype=np.float32)
        return [
            Completion(
                episode=request.episode,
                response_ids=self._ids,
                logprobs=nothing,
                entropy=nothing,
                finished=True,
                policy_version=self._policy.version,
            )
            for request in requests
        ]

    def release(self, episode: int) -> None: ...
