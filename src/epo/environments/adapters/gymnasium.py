"""Gymnasium environments whose observations are text or can be rendered as text.

Towers et al., "Gymnasium: A Standard Interface for Reinforcement Learning Environments", arXiv 2407.17032.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

from epo.environments.adapters._shared import SeededSuite, plain, require
from epo.environments.base import TextEnv
from epo.errors import UserError
from epo.types import Observation, Step, Task

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CURSOR = re.compile(r"\x1b\[4[0-9]m(.)\x1b\[0m", re.DOTALL)  # toy_text marks the agent by colour alone


class GymnasiumSuite(SeededSuite):
    """Any Gymnasium environment with text or `ansi` rendering, and with text or named discrete actions.

    A task is a seed. Full success is Gymnasium's to name, and it has no name for it: an episode succeeds when it
    terminates with a last reward of at least `success_reward`. The agent's reward is 1 for success and 0 otherwise.

    Args:
        id: as for `gymnasium.make`; `my_module:MyEnv-v0` imports the module first.
        options: keyword arguments of `gymnasium.make`.
        actions: names of the discrete actions, in their order; none for environments that take text.
        goal: the instruction in words.
        success_reward: the last reward that means full success.
        train: tasks in `train`.
        iid: tasks in `iid`.
        ood: tasks in `ood`, where `ood_options` are given.
        ood_options: keyword arguments in place of `options` in `ood`; without them there is no such split.
        seed: the first task's seed.

    Raises:
        UserError: an option out of its range.
    """

    name = "gymnasium"
    library = ("gymnasium", "gymnasium")

    def __init__(
        self,
        *,
        id: str,
        options: dict[str, Any] | None = None,
        actions: list[str] | None = None,
        goal: str = "",
        success_reward: float = 1.0,
        train: int = 64,
        iid: int = 32,
        ood: int = 32,
        ood_options: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(goal=id, seed=seed, train=train, iid=iid, ood=ood, options=options, ood_options=ood_options)
        self._id, self._actions, self._goal, self._success_reward = id, actions, goal or f"Play {id}.", success_reward

    def make_env(self) -> GymnasiumEnv:
        return GymnasiumEnv(
            self._id,
            options=self._options,
            actions=self._actions,
            goal=self._goal,
            success_reward=self._success_reward,
        )

    def prepare(self) -> None:
        with self.make_env() as env:
            for split in self.splits:
                env.open(split)

    def provenance(self) -> dict[str, Any]:
        return {"gymnasium": version("gymnasium"), "id": self._id, "options": self._options}


class GymnasiumEnv(TextEnv):
    """Plays one Gymnasium environment. Options: `GymnasiumSuite`.

    An action that has no name, or that is not in the text space, does not reach the environment.
    """

    def __init__(
        self,
        id: str,
        *,
        options: dict[str, dict[str, Any]],
        actions: list[str] | None,
        goal: str,
        success_reward: float,
    ) -> None:
        self._id, self._options, self._names = id, options, actions
        self._goal, self._success_reward = goal, success_reward
        self._env: Any = None
        self._opened: dict[str, Any] | None = None
        self._renders = False
        self._text = ""
        self._over = True

    def open(self, split: str) -> None:
        """Make the environment of a split, unless it is open.

        Raises:
            UserError: gymnasium or the environment is missing, or is not one that can be played in words.
        """
        options = self._options[split]
        if self._env is not None and options == self._opened:
            return
        gymnasium = require("gymnasium", extra="gymnasium")
        self.close()
        try:
            self._env = gymnasium.make(self._id, disable_env_checker=True, **options)
            is_text = isinstance(self._env.observation_space, gymnasium.spaces.Text)
            self._renders = not is_text
            if not is_text:
                if "ansi" not in self._env.metadata.get("render_modes", ()):
                    raise UserError(
                        f"suite 'gymnasium': {self._id} observes {self._env.observation_space} and has no render mode"
                        " 'ansi'; wrap it so that it observes gymnasium.spaces.Text"
                    )
                self._env.close()
                self._env = gymnasium.make(self._id, disable_env_checker=True, **{**options, "render_mode": "ansi"})
        except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
            raise UserError(f"suite 'gymnasium': {self._id!r} with options {options} cannot be made: {error}") from None
        self._check_actions(gymnasium.spaces)
        self._opened = options

    def reset(self, task: Task) -> Observation:
        self.open(task.split)
        first, _ = self._env.reset(seed=task.seed)
        self._over = False
        self._text = self._words(first)
        return Observation(text=self._text, admissible_actions=self._admissible(), goal=self._goal)

    def step(self, action: str) -> Step:
        if self._over:
            raise RuntimeError("the episode is over: call reset first")
        chosen = self._chosen(action)
        if chosen is None:
            observation = Observation(text=f"Nothing happens.\n{self._text}", admissible_actions=self._admissible())
            return Step(observation=observation, reward=0.0, terminated=False, understood=False)
        following, reward, terminated, truncated, _ = self._env.step(chosen)
        self._over = bool(terminated or truncated)
        self._text = self._words(following)
        success = bool(terminated) and float(reward) >= self._success_reward
        return Step(
            observation=Observation(text=self._text, admissible_actions=() if self._over else self._admissible()),
            reward=float(success),
            terminated=bool(terminated),
            truncated=bool(truncated),
            success=success,
            score=float(success),
        )

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env, self._over = None, True

    def _check_actions(self, spaces: Any) -> None:
        space = self._env.action_space
        if isinstance(space, spaces.Discrete):
            if self._names is None or len(set(self._names)) != space.n or len(self._names) != space.n:
                raise UserError(
                    f"suite 'gymnasium': option 'actions' must name the {space.n} actions of {self._id}, each"
                    f" differently, not {self._names!r}"
                )
        elif not isinstance(space, spaces.Text):
            raise UserError(f"suite 'gymnasium': {self._id} takes {space}; actions must be Discrete or Text")

    def _admissible(self) -> tuple[str, ...] | None:
        return None if self._names is None else tuple(self._names)

    def _chosen(self, action: str) -> Any:
        """What the environment takes for `action`; None where there is no such thing."""
        space = self._env.action_space
        if self._names is None:
            return action if space.contains(action) else None
        word = plain(action).lower()
        known = [name.lower() for name in self._names]
        return space.start + known.index(word) if word in known else None

    def _words(self, observation: Any) -> str:
        text = str(self._env.render()) if self._renders else str(observation)
        return _ANSI.sub("", _CURSOR.sub(r"[\1]", text)).strip("\n")
