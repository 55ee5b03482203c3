"""Two small Gymnasium environments, registered when they are imported: one takes text, one has named actions."""

from __future__ import annotations

import string
from typing import Any

import gymnasium
from gymnasium import spaces

CHARSET = string.ascii_letters + string.digits + string.punctuation + " \n"


class Echo(gymnasium.Env[str, str]):
    """Say the colour that the observation names."""

    def __init__(self) -> None:
        self.observation_space = spaces.Text(100, min_length=0, charset=CHARSET)
        self.action_space = spaces.Text(20, charset=CHARSET)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.colour = ("red", "green", "blue")[self.np_random.integers(3)]
        return f"Say {self.colour}.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        right = action == self.colour
        return "Well said." if right else f"Say {self.colour}.", float(right), right, False, {}


class Line(gymnasium.Env[str, Any]):
    """Walk to the end of a line; falling off its other end is a failure."""

    def __init__(self, *, length: int = 3) -> None:
        self.length = length
        self.observation_space = spaces.Text(100, min_length=0, charset=CHARSET)
        self.action_space = spaces.Discrete(2, start=5)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = 0
        return f"place {self.place}", {}

    def step(self, action: Any) -> tuple[str, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.place += 1 if action == 6 else -1
        return f"place {self.place}", float(self.place == self.length), not 0 <= self.place < self.length, False, {}


gymnasium.register("Echo-v0", Echo, max_episode_steps=4)
gymnasium.register("Line-v0", Line)
