"""Experts for three environments that have none, so that a model may begin from nothing: a dozen lines each.

Imported by name in worker processes.
"""

from __future__ import annotations

import re
from typing import Any

from epo.environments.adapters.gymnasium import GymnasiumEnv, GymnasiumSuite
from epo.environments.adapters.openenv import OpenEnvEnv, OpenEnvSuite
from epo.environments.adapters.textarena import TextArenaEnv, TextArenaSuite
from epo.types import Task

_DISCOUNT = 0.97
_SWEEPS = 500


class LakeEnv(GymnasiumEnv):
    """FrozenLake, and the policy that value iteration finds for it."""

    def demonstration(self, task: Task) -> list[str]:
        self.open(task.split)
        lake: Any = self._env.unwrapped
        values = [0.0] * len(lake.P)

        def worth(state: int, action: int) -> float:
            return sum(p * (r + _DISCOUNT * values[to] * (not over)) for p, to, r, over in lake.P[state][action])

        for _ in range(_SWEEPS):
            values = [max(worth(state, action) for action in range(4)) for state in range(len(values))]
        self.reset(task)
        actions: list[str] = []
        while True:
            best = max(range(4), key=lambda action: worth(int(lake.s), action))
            actions.append((self._names or [])[best])
            step = self.step(actions[-1])
            if step.terminated or step.truncated:
                return actions


class LakeSuite(GymnasiumSuite):
    """FrozenLake with an expert."""

    name = "lake"

    def make_env(self) -> LakeEnv:
        return LakeEnv(
            self._id,
            options=self._options,
            actions=self._actions,
            goal=self._goal,
            success_reward=self._success_reward,
        )


class GuessEnv(TextArenaEnv):
    """GuessTheNumber, and bisection."""

    def demonstration(self, task: Task) -> list[str]:
        low, high = map(int, re.findall(r"between (\d+) and (\d+)", self.reset(task).goal or "")[0])
        actions: list[str] = []
        while True:
            actions.append(str((low + high) // 2))
            step = self.step(actions[-1])
            if step.terminated:
                return actions
            if "higher" in step.observation.text:
                low = int(actions[-1]) + 1
            else:
                high = int(actions[-1]) - 1


class GuessSuite(TextArenaSuite):
    """GuessTheNumber with an expert."""

    name = "guess"

    def make_env(self) -> GuessEnv:
        return GuessEnv(self._id, options=self._options)


class DialEnv(OpenEnvEnv):
    """The dial of `tests/environments/openenv_game.py`, turned the short way."""

    def demonstration(self, task: Task) -> list[str]:
        at, wanted = map(int, re.findall(r"\d+", self.reset(task).text))
        return ["up" if wanted > at else "down"] * abs(wanted - at) + ["open"]


class DialSuite(OpenEnvSuite):
    """The dial with an expert."""

    name = "dial"

    def make_env(self) -> DialEnv:
        return DialEnv(self._url, seconds=self._seconds, options=self._options, **self._shape)
