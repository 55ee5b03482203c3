"""A corridor that breaks the contract in one way, for the tests of `epo env check`. Imported in worker processes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from epo.environments.base import TaskSuite, TextEnv
from epo.environments.corridor import CorridorEnv, CorridorSuite
from epo.errors import UserError
from epo.types import Observation, Step, Task

LEAKED: list[Any] = []


class BrokenEnv(TextEnv):
    def __init__(self, fault: str) -> None:
        if fault == "make_env raises":
            raise ValueError("no walls")
        self.fault, self.inner, self.resets, self.over = fault, CorridorEnv(choices=3, strict=False), 0, True

    def reset(self, task: Task) -> Any:
        self.resets += 1
        observation: Any = self.inner.reset(replace(task, suite="corridor"))
        self.over = False
        match self.fault:
            case "counts resets":
                return replace(observation, text=f"Day {self.resets}. {observation.text}")
            case "process id":
                return replace(observation, text=f"{observation.text} {os.getpid()}")
            case "surrogates":
                return replace(observation, text="\ud800")
            case "no words":
                return replace(observation, text="", goal=None)
            case "reset returns text":
                return observation.text
            case "memory":
                LEAKED.append(b"x" * 2_000_000)
            case "descriptors":
                LEAKED.append(os.dup(0))
            case "slow":
                time.sleep(0.03)
        return observation

    def step(self, action: str) -> Any:
        match self.fault:
            case "empty" if not action:
                raise IndexError("no words")
            case "surrogate" if any("\ud800" <= letter <= "\udfff" for letter in action):
                action.encode()
            case "dies" if "\x00" in action:
                os._exit(3)
            case "hangs" if len(action) > 10_000:
                time.sleep(60)
            case "slow":
                time.sleep(0.03)
        if self.over and self.fault == "goes on":
            return Step(observation=Observation(text="Hm."), reward=0.0, terminated=False)
        if self.over and self.fault == "other error":
            raise KeyError("over")
        step: Any = self.inner.step(action)
        self.over = step.terminated
        match self.fault:
            case "score":
                return replace(step, score=2.0)
            case "reward":
                return replace(step, reward=float("nan"))
            case "success":
                return replace(step, success=True)
            case "understood":
                return replace(step, understood=1)
            case "goal":
                return replace(step, observation=replace(step.observation, goal="Go on."))
        return step

    def demonstration(self, task: Task) -> Any:
        actions = self.inner.demonstration(replace(task, suite="corridor"))
        return {"gives up": actions[:-1], "goes too far": [*actions, "push"], "one string": "push"}.get(
            self.fault, actions
        )


class BrokenSuite(TaskSuite):
    """Corridors of three doors, with a `fault`."""

    name = "broken"

    def __init__(self, *, fault: str = "") -> None:
        if fault == "constructor raises":
            raise ValueError("no land")
        self.fault, self.inner = fault, CorridorSuite(length=3, tasks=4)
        if fault == "no train":
            self.splits = ("iid", "ood")
        if fault == "train alone":
            self.splits = ("train",)

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self.splits:
            if self.fault == "any split":
                return []
            raise UserError(f"no split {split!r}")
        if self.fault == "empty split" and split == "ood":
            return []
        source = "train" if self.fault == "shared" else split
        tasks = [replace(task, suite=self.name, split=split) for task in self.inner.tasks(source)]
        match self.fault:
            case "wrong split":
                return [replace(task, split="train") for task in tasks]
            case "wrong suite":
                return [replace(task, suite="other") for task in tasks]
            case "twice":
                return [tasks[0], *tasks]
            case "task order":
                return sorted(tasks, key=lambda task: hash(task.id))
            case "id type":
                return [replace(task, goal=None) for task in tasks]  # pyright: ignore[reportArgumentType]
        return tasks

    def make_env(self) -> TextEnv:
        return BrokenEnv(self.fault)
