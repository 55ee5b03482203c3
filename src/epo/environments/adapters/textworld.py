"""TextWorld's own games: made with its generator as `tw-make custom` does, compiled with the Inform 7 it ships.

Côté et al., "TextWorld: A Learning Environment for Text-based Games", arXiv 1806.11532.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from epo.environments.adapters._shared import SeededSuite, plain, require
from epo.environments.base import TextEnv
from epo.environments.household import cache_root
from epo.errors import EnvironmentFailure, UserError
from epo.types import Observation, Step, Task

_META = re.compile(
    r"\b(quit|q|restart|restore|save|undo|script|transcript|verify|version|tw-.*|restrict|oops|again|g)\b"
)
"""Commands to the interpreter, not to the game."""
_NOT_UNDERSTOOD = re.compile(
    "That's not a verb I recognise|I didn't understand|I only understood|I beg your pardon|You can't see any such thing"
)
_COMMAND = re.compile(r"[A-Za-z0-9' -]*[A-Za-z0-9][A-Za-z0-9' -]*")
"""What a game's own words are made of. Control characters, braces and long lines kill the interpreter, and the process
with it; a full stop would join one command to another."""
_LONGEST_COMMAND = 100


class TextWorldSuite(SeededSuite):
    """Generated TextWorld games; `ood` has longer quests than `train` and `iid`.

    The games are made once (`prepare`, or the first use; a few seconds each) and kept under `$EPO_CACHE`, else
    `~/.cache/epo`. Full success is winning; the score is the game's.

    Args:
        rooms: rooms of a game.
        objects: objects of a game.
        quest_length: actions that the quest takes in `train` and `iid`.
        ood_quest_length: the same in `ood`; None is two more.
        train: games in `train`.
        iid: games in `iid`.
        ood: games in `ood`.
        seed: the first game's seed.
        cache: folder to keep the games in instead.

    Raises:
        UserError: an option out of its range.
    """

    name = "textworld"
    library = ("textworld", "alfworld")

    def __init__(
        self,
        *,
        rooms: int = 3,
        objects: int = 6,
        quest_length: int = 3,
        ood_quest_length: int | None = None,
        train: int = 16,
        iid: int = 8,
        ood: int = 8,
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        longer = quest_length + 2 if ood_quest_length is None else ood_quest_length
        for option, value in [
            ("rooms", rooms),
            ("objects", objects),
            ("quest_length", quest_length),
            ("ood_quest_length", longer),
        ]:
            if value < 1:
                raise UserError(f"suite {self.name!r}: option {option!r} must be at least 1, not {value}")
        super().__init__(goal="", seed=seed, train=train, iid=iid, ood=ood, options=None, ood_options={})
        self._plan = {
            task.id: {
                "seed": task.seed,
                "rooms": rooms,
                "objects": objects,
                "quest_length": longer if split == "ood" else quest_length,
            }
            for split, tasks in self._tasks.items()
            for task in tasks
        }
        self._cache = cache

    def make_env(self) -> TextWorldEnv:
        return TextWorldEnv(self._games())

    def prepare(self) -> None:
        self._games()

    def provenance(self) -> dict[str, Any]:
        games = self._games()
        hashes = [hashlib.sha256((games / f"{n}.z8").read_bytes()).hexdigest() for n in range(len(self._plan))]
        digest = hashlib.sha256("".join(hashes).encode()).hexdigest()
        return {"textworld": version("textworld"), "jericho": version("jericho"), "games_sha256": digest}

    def _games(self) -> Path:
        """The folder of the games, made first where they are missing."""
        require("textworld.version", extra="alfworld")
        content = {"plan": self._plan, "textworld": version("textworld")}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        folder = cache_root(self._cache) / "textworld" / digest
        if (folder / "manifest.json").is_file():
            return folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{digest}-", dir=folder.parent))
        except OSError as error:
            raise UserError(
                f"cannot write games to {folder.parent}: {error}; set EPO_CACHE to a writable folder"
            ) from None
        try:
            done = subprocess.run(
                [sys.executable, "-m", f"{__package__}._textworld_games", str(staging), json.dumps(self._plan)],
                capture_output=True,
                text=True,
                check=False,
                env={
                    **os.environ,
                    "PYTHONHASHSEED": "0",
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OMP_NUM_THREADS": "1",
                },
            )
            if done.returncode:
                words = done.stderr.strip().splitlines() or ["no message"]
                raise UserError(f"suite 'textworld': no such games can be made: {words[-1]}; try more rooms or objects")
            if not (folder / "manifest.json").is_file():  # another process may have been faster
                os.rename(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return folder


class TextWorldEnv(TextEnv):
    """Plays compiled games. Commands to the interpreter (save, restart, undo, ...) are not understood.

    Args:
        games: folder with `manifest.json`, game number n in `n.z8`.
    """

    def __init__(self, games: Path) -> None:
        self._folder = games
        self._walkthroughs: dict[str, list[str]] = json.loads((games / "manifest.json").read_text(encoding="utf-8"))
        self._engine: Any = None
        self._loaded: str | None = None
        self._text = ""
        self._actions: tuple[str, ...] = ()
        self._best = 1
        self._over = True

    def reset(self, task: Task) -> Observation:
        try:
            if self._loaded != task.id:
                self._load(task)
            state = self._engine.reset()
            self._best = max(1, int(state["max_score"]))
            objective = str(state["objective"])
            opening = str(state.feedback).partition("\n>")[0]
            self._actions = tuple(sorted(state["admissible_commands"]))
        except UserError:
            raise
        except Exception as error:
            self.close()
            raise EnvironmentFailure(f"TextWorld failed to start {task.id}: {error!r}") from error
        self._text = opening.rpartition(objective)[2].strip()  # without the banner
        self._over = False
        return Observation(text=self._text, admissible_actions=self._actions, goal=objective)

    def step(self, action: str) -> Step:
        if self._over:
            raise RuntimeError("the episode is over: call reset first")
        command = plain(action)
        if len(command) > _LONGEST_COMMAND or not _COMMAND.fullmatch(command) or _META.search(command.lower()):
            observation = Observation(text="That is nothing you can do here.", admissible_actions=self._actions)
            return Step(observation=observation, reward=0.0, terminated=False, understood=False)
        try:
            state, score, _ = self._engine.step(command)
            won, lost = bool(state["won"]), bool(state["lost"])
            text = str(state.feedback).partition("\n>")[0].partition("Would you like to RESTART")[0].strip()
            self._over = won or lost
            self._actions = () if self._over else tuple(sorted(state["admissible_commands"]))
        except Exception as error:
            self.close()
            raise EnvironmentFailure(f"TextWorld failed at {command!r}: {error!r}") from error
        return Step(
            observation=Observation(text=text, admissible_actions=self._actions),
            reward=float(won),
            terminated=self._over,
            success=won,
            score=1.0 if won else min(1.0, max(0.0, float(score) / self._best)),
            understood=_NOT_UNDERSTOOD.search(text) is None,
        )

    def demonstration(self, task: Task) -> list[str] | None:
        return list(self._walkthroughs[task.id]) if task.id in self._walkthroughs else None

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine, self._loaded, self._over = None, None, True

    def _load(self, task: Task) -> None:
        if task.id not in self._walkthroughs:
            raise UserError(f"suite 'textworld' has no task {task.id!r}")
        textworld = require("textworld", extra="alfworld")
        self.close()
        wanted = textworld.EnvInfos(won=True, lost=True, admissible_commands=True, max_score=True, objective=True)
        number = list(self._walkthroughs).index(task.id)
        self._engine = textworld.start(str(self._folder / f"{number}.z8"), wanted)
        self._loaded = task.id
