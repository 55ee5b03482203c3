"""ALFWorld's text games: the published ones where they are on disk, generated household games everywhere.

Both suites play on the same engine and differ in where their games come from.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, cast

from epo.environments._textworld_memo import new_engine, require_packages
from epo.environments.base import TaskSuite, TextEnv
from epo.environments.household import (
    DEFAULT_COUNTS,
    FOLDERS,
    TASK_TYPES,
    HouseholdOptions,
    cache_root,
    check_task_types,
    ensure_games,
    file_hash,
    versions,
)
from epo.errors import EnvironmentFailure, UserError
from epo.types import Observation, Step, Task

GENERATED_NOTE = (
    "Generated household games on ALFWorld's engine, not the published ALFWorld splits: "
    "success rates do not compare with those of papers."
)
WORKER_MB = 70
"""`TaskSuite.worker_mb`, before games are remembered (docs/environments-alfworld.md)."""
_GOAL_MARK = "Your task is to:"
_BANNER = "-= Welcome to TextWorld, ALFRED! =-"
_NOTHING = "Nothing happens."


class AlfworldEnv(TextEnv):
    """Plays ALFWorld games from a folder laid out as the published data.

    Success is the engine's own `won`; the reward is 1 with the winning action and 0 before. There is no partial credit
    and no failure. Observations never depend on anything but the game file and the actions.

    Args:
        games: the folder that holds `train`, `valid_seen` and `valid_unseen`; a task's id is a path below it.
    """

    def __init__(self, games: Path) -> None:
        self._games = games
        self._engine: Any = None
        self._loaded: str | None = None
        self._playing = False

    def reset(self, task: Task) -> Observation:
        self._playing = False
        data = None if task.id == self._loaded else self._read(task)
        if self._engine is None:
            self._engine = new_engine()
        try:
            if data is not None:
                self._loaded = None
                self._engine.load(data)
                self._loaded = task.id
            state = self._engine.reset()
            intro, mark, goal = state.feedback.partition(_GOAL_MARK)
            actions = _agent_actions(state)
        except Exception as error:
            self._loaded = None
            raise EnvironmentFailure(f"ALFWorld's engine failed to start {task.id}: {error!r}") from error
        if not mark:
            raise EnvironmentFailure(f"game {task.id} does not say {_GOAL_MARK!r} in its opening text: {intro[:200]!r}")
        self._playing = True
        text = intro.strip().removeprefix(_BANNER).strip()
        return Observation(text=text, admissible_actions=actions, goal=goal.strip())

    def step(self, action: str) -> Step:
        """Do `action`.

        Raises:
            EnvironmentFailure: the engine failed.
            RuntimeError: no episode is under way.
        """
        if not self._playing:
            raise RuntimeError("the episode is over: call reset first")
        command = str(action).encode("utf-8", errors="replace").decode("utf-8").strip()
        try:
            state, _, _ = self._engine.step(command)
            text, actions, won = state.feedback.strip(), _agent_actions(state), bool(state["won"])
        except Exception as error:
            self._playing, self._loaded = False, None
            raise EnvironmentFailure(f"ALFWorld's engine failed at {command[:200]!r}: {error!r}") from error
        self._playing = not won
        return Step(
            observation=Observation(text=text, admissible_actions=actions),
            reward=float(won),
            terminated=won,
            success=won,
            score=float(won),
            understood=text != _NOTHING,
        )

    def demonstration(self, task: Task) -> list[str] | None:
        """The walkthrough stored with the game, in the game's own words; None where it has none."""
        return self._read(task).get("walkthrough") or None

    def close(self) -> None:
        self._engine, self._loaded, self._playing = None, None, False

    def _read(self, task: Task) -> dict[str, Any]:
        place = PurePosixPath(task.id)
        if place.is_absolute() or ".." in place.parts or "\0" in task.id:
            raise UserError(f"task id {task.id!r}: must be a folder below {self._games}, as `tasks` lists them")
        path = self._games / place / "game.tw-pddl"
        try:
            game = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(game, dict):
                raise ValueError("it is no JSON object")
            return cast("dict[str, Any]", game)
        except (OSError, ValueError, RecursionError) as error:
            raise EnvironmentFailure(f"task {task.id!r}: the game {path} cannot be read: {error}") from error


def _agent_actions(state: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(command for command in state["admissible_commands"] if command != "help")


class HouseholdSuite(TaskSuite):
    """Generated games in ALFRED's rooms: `train` and `iid` in the training floor plans, `ood` in held-out ones.

    The games are made once (`prepare`, or the first use) and kept under `$EPO_CACHE`, else `~/.cache/epo`.

    Args:
        counts: games per split; splits left out have their default (48 train, 16 iid, 16 ood).
        seed: which games are drawn.
        max_copies: most objects of one type in a room.
        density: probability that a type of object the scene lists is in the room at all.
        task_types: ALFWorld's names of the tasks to make; None means all six. They take turns.
        max_receptacles: trim rooms to so many receptacles, what the task needs among them; None leaves them whole.
        cache: folder to keep the games in instead.

    Raises:
        UserError: an option out of its range.
    """

    name = "household"
    worker_mb = WORKER_MB

    def __init__(
        self,
        *,
        counts: dict[str, int] | None = None,
        seed: int = 0,
        max_copies: int = 3,
        density: float = 0.8,
        task_types: list[str] | None = None,
        max_receptacles: int | None = None,
        cache: str | None = None,
    ) -> None:
        self._options = HouseholdOptions(
            counts={**DEFAULT_COUNTS, **(counts or {})},
            seed=seed,
            max_copies=max_copies,
            density=density,
            task_types=TASK_TYPES if task_types is None else tuple(task_types),
            max_receptacles=max_receptacles,
        )
        self._cache = cache
        self._made: tuple[Path, dict[str, Any]] | None = None

    def prepare(self, *, progress: Callable[[int, int], None] | None = None) -> None:
        """Make the games unless they are there. `progress` is called with (games done, games in all)."""
        self._made = ensure_games(self._options, cache=self._cache, progress=progress)

    def _games(self) -> tuple[Path, dict[str, Any]]:
        if self._made is None:
            self.prepare()
        assert self._made is not None
        return self._made

    def tasks(self, split: str) -> Sequence[Task]:
        _check_split(self, split)
        entries = self._games()[1]["games"][split]
        return [Task(suite=self.name, id=e["id"], split=split, goal=e["task_type"]) for e in entries]

    def make_env(self) -> AlfworldEnv:
        return AlfworldEnv(self._games()[0] / "json_2.1.1")

    def provenance(self) -> dict[str, Any]:
        manifest = self._games()[1]
        games = {split: [[e["id"], e["sha256"]] for e in entries] for split, entries in manifest["games"].items()}
        return {
            "note": GENERATED_NOTE,
            "options": asdict(self._options),
            "generator": manifest["generator"],
            "versions": manifest["versions"],
            "games_sha256": _digest(games),
        }


class AlfworldSuite(TaskSuite):
    """The published ALFWorld games: `valid_seen` is `iid`, `valid_unseen` is `ood`.

    As in ALFWorld's own loader, tasks with movable receptacles or sliced objects and games not marked solvable are left
    out. The folder is scanned once; the index is kept under `$EPO_CACHE`, else `~/.cache/epo`, until a file changes.

    Args:
        data: folder with `json_2.1.1` in it; None means `$ALFWORLD_DATA`.
        task_types: ALFWorld's names of the tasks to play; None means all six.

    Raises:
        UserError: no data there, or an unknown task type.
    """

    name = "alfworld"
    worker_mb = WORKER_MB

    def __init__(self, *, data: str | None = None, task_types: list[str] | None = None) -> None:
        self._root = _published_games(data)
        self._task_types = TASK_TYPES if task_types is None else tuple(task_types)
        check_task_types(self._task_types)
        self._index: dict[str, list[dict[str, str]]] | None = None

    def prepare(self) -> None:
        require_packages()
        self._games()

    def _games(self) -> dict[str, list[dict[str, str]]]:
        if self._index is None:
            self._index = _index(self._root)
        return self._index

    def tasks(self, split: str) -> Sequence[Task]:
        _check_split(self, split)
        entries = [e for e in self._games()[split] if e["task_type"] in self._task_types]
        if not entries:
            raise UserError(
                f"no playable game in {self._root / FOLDERS[split]}: it needs <task>/<trial>/game.tw-pddl files marked "
                "solvable, as `alfworld-download` fetches them (or as `alfworld-generate` makes them)"
            )
        return [Task(suite=self.name, id=e["id"], split=split, goal=e["task_type"]) for e in entries]

    def make_env(self) -> AlfworldEnv:
        return AlfworldEnv(self._root)

    def provenance(self) -> dict[str, Any]:
        games = {split: [[e["id"], e["sha256"]] for e in entries] for split, entries in self._games().items()}
        return {
            "note": "ALFWorld games as found on disk; whether they are the published ones, their hash decides.",
            "task_types": list(self._task_types),
            "versions": versions(),
            "games": {split: len(entries) for split, entries in games.items()},
            "games_sha256": _digest(games),
        }


def _check_split(suite: TaskSuite, split: str) -> None:
    if split not in suite.splits:
        raise UserError(f"suite {suite.name!r} has no split {split!r}; its splits: {', '.join(suite.splits)}")


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _published_games(data: str | None) -> Path:
    given, field = (data, "data") if data else (os.environ.get("ALFWORLD_DATA"), "ALFWORLD_DATA")
    fix = (
        "Run `alfworld-download` (it comes with alfworld) and set ALFWORLD_DATA to the folder that holds json_2.1.1, "
        "or use the suite `household`, which makes its own games and needs no data."
    )
    if not given:
        raise UserError(f"the suite `alfworld` needs ALFWorld's data, and ALFWORLD_DATA is not set. {fix}")
    root = Path(given).expanduser().absolute() / "json_2.1.1"
    if not root.is_dir():
        raise UserError(f"{field} is {given!r}, but there is no folder {root}. {fix}")
    return root


def _index(root: Path) -> dict[str, list[dict[str, str]]]:
    """Split -> playable games, sorted by id, each with `id`, `task_type` and `sha256`."""
    found = {split: _candidates(root / folder) for split, folder in FOLDERS.items()}
    stamps = [
        [str(path), s.st_size, s.st_mtime_ns] for paths in found.values() for path in paths for s in [path.stat()]
    ]
    cached = cache_root() / "alfworld" / f"{_digest(stamps)[:16]}.json"
    try:
        known = json.loads(cached.read_text(encoding="utf-8"))
        if all(set(e) == {"id", "task_type", "sha256"} for split in FOLDERS for e in known[split]):
            return known
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # not scanned yet, or damaged
    index: dict[str, list[dict[str, str]]] = {}
    for split, paths in found.items():
        index[split] = []
        for path in paths:
            if _is_solvable(path):
                game, task_type = path.parent.relative_to(root).as_posix(), path.parent.parent.name.split("-")[0]
                index[split].append({"id": game, "task_type": task_type, "sha256": file_hash(path)})
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=cached.parent, delete=False) as out:
            json.dump(index, out)
        Path(out.name).replace(cached)
    except OSError as error:
        raise UserError(f"cannot write the index {cached}: {error}; set EPO_CACHE to a writable folder") from error
    return index


def _candidates(folder: Path) -> list[Path]:
    """Game files in a split's folder that ALFWorld's loader would look into."""
    return [
        path
        for path in sorted(folder.glob("*/*/game.tw-pddl"))
        if path.parent.parent.name.split("-")[0] in TASK_TYPES
        and "movable" not in path.parent.parent.name
        and "Sliced" not in path.parent.parent.name
        and (path.parent / "traj_data.json").is_file()
    ]


def _is_solvable(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("solvable") is True
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"the game {path} is not valid JSON ({error}); delete it or download it again") from error
