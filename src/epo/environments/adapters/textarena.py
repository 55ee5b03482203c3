"""TextArena's games for one player.

Guertler et al., "TextArena", arXiv 2504.11442.
"""

from __future__ import annotations

import random
from importlib.metadata import version
from typing import Any

from epo.environments.adapters._shared import SeededSuite, plain, require
from epo.environments.base import TextEnv
from epo.errors import EnvironmentFailure, UserError
from epo.types import Observation, Step, Task


class TextArenaSuite(SeededSuite):
    """A TextArena game for one player. Success is the game's own reward of 1, and partial reward is the score.

    Games that fetch word lists (Wordle, Hangman and others) need NLTK's data on disk.

    Args:
        id: such as `GuessTheNumber-v0`.
        options: what to change in the game's registered settings.
        train: tasks in `train`; a task is a seed.
        iid: tasks in `iid`.
        ood: tasks in `ood`, where `ood_options` are given.
        ood_options: settings in place of `options` in `ood`; without them there is no such split.
        seed: the first task's seed.

    Raises:
        UserError: an option out of its range.
    """

    name = "textarena"
    library = ("textarena", "textarena")

    def __init__(
        self,
        *,
        id: str = "GuessTheNumber-v0",
        options: dict[str, Any] | None = None,
        train: int = 64,
        iid: int = 32,
        ood: int = 32,
        ood_options: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(goal=id, seed=seed, train=train, iid=iid, ood=ood, options=options, ood_options=ood_options)
        self._id = id

    def make_env(self) -> TextArenaEnv:
        return TextArenaEnv(self._id, options=self._options)

    def prepare(self) -> None:
        with self.make_env() as env:
            for split in self.splits:
                env.make(split)

    def provenance(self) -> dict[str, Any]:
        return {"textarena": version("textarena"), "id": self._id, "options": self._options}


class TextArenaEnv(TextEnv):
    """Plays one game at a time. Options: `TextArenaSuite`.

    The game draws from Python's global random numbers, which `reset` seeds: one environment a process.
    """

    def __init__(self, id: str, *, options: dict[str, dict[str, Any]]) -> None:
        self._id, self._options = id, options
        self._game: Any = None
        self._over = True

    def make(self, split: str) -> Any:
        """A new game, with its settings of a split.

        Raises:
            UserError: textarena or the game is missing, refuses its options, or is not for one player.
        """
        library = require("textarena", extra="textarena")
        options = self._options[split]
        try:
            # Without wrappers it hands out what is new since the last turn.
            game = library.make(env_id=f"{self._id}-raw", **options)
            game.reset(num_players=1, seed=0)
        except (ValueError, TypeError, AssertionError, LookupError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"suite 'textarena': {self._id!r} with options {options} cannot be played: {reason}"
            ) from None
        return game

    def reset(self, task: Task) -> Observation:
        self._game = self.make(task.split)
        random.seed(task.seed)
        self._game.reset(num_players=1, seed=task.seed)
        self._over = False
        goal, *rest = self._messages()
        return Observation(text="\n".join(rest) or "Your turn.", goal=goal)

    def step(self, action: str) -> Step:
        if self._over:
            raise RuntimeError("the episode is over: call reset first")
        words = plain(action)
        try:
            # As the library's own ActionFormattingWrapper does.
            done, _ = self._game.step(words if "[" in words or "]" in words else f"[{words}]")
            understood = not self._game.state.made_invalid_move
            messages = self._messages()
            rewards = self._game.close()[0] if done else {}
        except Exception as error:
            self._over = True
            raise EnvironmentFailure(f"TextArena's {self._id} failed at {words[:200]!r}: {error!r}") from error
        self._over = bool(done)
        score = min(1.0, max(0.0, float((rewards or {}).get(0, 0.0))))
        return Step(
            observation=Observation(text="\n".join(messages) or "Your turn."),
            reward=float(score == 1),
            terminated=self._over,
            success=score == 1,
            score=score,
            understood=bool(understood),
        )

    def close(self) -> None:
        self._game, self._over = None, True

    def _messages(self) -> list[str]:
        """What the game has said since the last turn; not what the player said."""
        _, observation = self._game.get_observation()
        return [str(text).strip() for sender, text, _ in observation if sender != 0 and str(text).strip()]
