"""Household games made up from ALFRED's floor plans: ALFWorld's engine and tasks where its data cannot be had.

Rooms, rules and wording are ALFWorld's own; the task, its targets and where every object lies are drawn (see
`_household_games`). The games are NOT the published splits, so no success rate on them compares with a paper's.

A set of games is a pure function of its options. It is made once, each game proven by replaying its walkthrough, and
kept on disk in the layout of the published data::

    <cache>/household/<digest>/manifest.json
    <cache>/household/<digest>/json_2.1.1/<folder>/<task>-<Object>-None-<Receptacle|Lamp>-<scene>/trial_T<id>/
        game.tw-pddl  traj_data.json
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing.connection import wait as wait_readable
from pathlib import Path
from typing import Any

from epo.environments._household_games import Game, alfred, sample_game, write_game
from epo.environments._textworld_memo import PACKAGES, new_engine, require_packages
from epo.errors import EnvironmentFailure, UserError

GENERATOR_VERSION = 1
"""Part of every cache digest: raise it whenever the same options would give other games."""
TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
FOLDERS = {"train": "train", "iid": "valid_seen", "ood": "valid_unseen"}
"""Our split -> ALFWorld's folder."""
DEFAULT_COUNTS = {"train": 48, "iid": 16, "ood": 16}
GAME_SECONDS = 300.0
"""After which no new game means that the engine hangs. A game takes seconds at most."""
_DRAWS_PER_GAME = 400


@dataclass(frozen=True, kw_only=True)
class HouseholdOptions:
    """What decides a set of games. Equal options give byte-identical games, on any machine."""

    counts: Mapping[str, int]
    """Games per split; task types take turns."""
    seed: int = 0
    max_copies: int = 3
    """Most objects of one type in a room (a pick-two task has two of its target at least)."""
    density: float = 0.8
    """Probability that a type of object the scene lists is in the room at all."""
    task_types: tuple[str, ...] = TASK_TYPES
    max_receptacles: int | None = None
    """Trim every room to so many receptacles, what the task needs among them. None leaves the floor plan whole."""

    def __post_init__(self) -> None:
        for split, count in self.counts.items():
            if split not in FOLDERS:
                raise UserError(f"counts: unknown split {split!r}; the splits are {', '.join(FOLDERS)}")
            if not _is_int(count) or count < 0:
                raise UserError(f"counts.{split} is {count!r}; it must be a whole number of at least 0")
        if not _is_int(self.seed):
            raise UserError(f"seed is {self.seed!r}; it must be a whole number")
        if not _is_int(self.max_copies) or self.max_copies < 1:
            raise UserError(f"max_copies is {self.max_copies!r}; it must be a whole number of at least 1")
        if isinstance(self.density, bool) or not isinstance(self.density, int | float) or not 0 <= self.density <= 1:
            raise UserError(f"density is {self.density!r}; it must be a number from 0 to 1")
        if self.max_receptacles is not None and (not _is_int(self.max_receptacles) or self.max_receptacles < 3):
            raise UserError(f"max_receptacles is {self.max_receptacles!r}; it must be null or a whole number >= 3")
        check_task_types(self.task_types)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_task_types(task_types: tuple[str, ...]) -> None:
    """Raises: UserError: the list is empty or names an unknown task type."""
    unknown = [t for t in task_types if t not in TASK_TYPES]
    if unknown or not task_types:
        raise UserError(f"task_types is {list(task_types)!r}; choose one or more of: {', '.join(TASK_TYPES)}")


def versions() -> dict[str, str]:
    """Versions of the engine's packages, read without importing them."""
    require_packages()
    return {name: metadata.version(name) for name in PACKAGES}


def cache_root(cache: str | os.PathLike[str] | None = None) -> Path:
    """`cache`, else `$EPO_CACHE`, else `~/.cache/epo`."""
    return Path(cache or os.environ.get("EPO_CACHE") or Path.home() / ".cache" / "epo").expanduser().absolute()


def games_folder(options: HouseholdOptions, *, cache: str | os.PathLike[str] | None = None) -> Path:
    """Where the games of `options` are kept, made or not."""
    content = {"options": asdict(options), "generator": GENERATOR_VERSION, "versions": versions()}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return cache_root(cache) / "household" / digest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete set of games; None where the set is missing, half-written or altered."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for game in (game for games in manifest["games"].values() for game in games):
            if file_hash(folder / "json_2.1.1" / game["id"] / "game.tw-pddl") != game["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ensure_games(
    options: HouseholdOptions,
    *,
    cache: str | os.PathLike[str] | None = None,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """The folder and manifest of the games of `options`, made first where they are missing or damaged.

    Args:
        processes: how many to use for making games; None means one per available core, 8 at most.
        progress: called with (games done, games in all).

    Raises:
        UserError: alfworld is missing, the options leave no room for so many games, or the cache cannot be written.
        EnvironmentFailure: the engine failed while games were made, or made none for `GAME_SECONDS`.
    """
    folder = games_folder(options, cache=cache)
    manifest = read_manifest(folder)
    if manifest is not None:
        return folder, manifest
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        fix = "set EPO_CACHE to a writable folder"
        raise UserError(f"cannot write games to {folder.parent}: {error}; {fix}") from error
    try:
        _make_games(options, staging, processes or min(8, _cores()), progress)
        manifest = read_manifest(folder)  # another process may have been faster
        if manifest is None:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # lost a race: then the winner's games are read
                staging.rename(folder)
            manifest = read_manifest(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if manifest is None:
        raise EnvironmentFailure(f"the games just written to {folder} cannot be read back")
    return folder, manifest


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make_games(
    options: HouseholdOptions, out: Path, processes: int, progress: Callable[[int, int], None] | None
) -> None:
    total = sum(options.counts.values())
    processes = max(1, min(processes, total))
    # Plain child processes: unlike a pool they need no guarded main module, and keep the engine out of this process.
    reading, writing = os.pipe()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    workers: list[subprocess.Popen[bytes]] = []
    logs = [out / f"worker-{i}.log" for i in range(processes)]
    games: list[dict[str, Any]] = []
    try:
        for index, log in enumerate(logs):
            job = {"options": asdict(options), "out": str(out), "index": index, "of": processes}
            command = [sys.executable, "-m", "epo.environments.household", json.dumps(job)]
            with log.open("wb") as stderr:
                workers.append(
                    subprocess.Popen(command, stdout=writing, stderr=stderr, stdin=subprocess.DEVNULL, env=env)
                )
        os.close(writing)
        for line in _lines(reading):
            games.append(json.loads(line))
            if progress is not None:
                progress(len(games), total)
        for worker, log in zip(workers, logs, strict=True):
            if worker.wait() == 3:
                raise UserError(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1])
            if (code := worker.returncode) != 0:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                words = log.read_text(encoding="utf-8", errors="replace").split("\n")
                last = next((line.strip()[-300:] for line in reversed(words) if line.strip()), "it wrote nothing")
                raise EnvironmentFailure(f"a process that makes household games {how}: {last}")
    except TimeoutError:
        raise EnvironmentFailure(
            f"no household game was made for {GAME_SECONDS:g} s, after {len(games)} of {total}: the engine hangs, or "
            f"the machine is too busy for {processes} processes more"
        ) from None
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        os.close(reading)
    for log in logs:
        log.unlink()
    games.sort(key=lambda game: (list(FOLDERS).index(game["split"]), game["number"]))
    entries = {
        split: [{k: g[k] for k in ("id", "task_type", "steps", "sha256")} for g in games if g["split"] == split]
        for split in FOLDERS
    }
    manifest = {
        "note": "Generated games, not the published ALFWorld splits.",
        "options": asdict(options),
        "generator": GENERATOR_VERSION,
        "versions": versions(),
        "games": entries,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _lines(pipe: int) -> Iterator[bytes]:
    """The lines of a pipe, until nobody writes to it any more.

    Raises:
        TimeoutError: there was none for `GAME_SECONDS`.
    """
    rest = b""
    while True:
        if not wait_readable([pipe], GAME_SECONDS):
            raise TimeoutError
        data = os.read(pipe, 65536)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from whole


def _work(job: dict[str, Any]) -> None:
    """Write the share `index` of `of` of all games, and a line of JSON to stdout for each."""
    options = HouseholdOptions(**{**job["options"], "task_types": tuple(job["options"]["task_types"])})
    engine, lines = new_engine(), sys.stdout
    for i, (split, number, game) in enumerate(sample_games(options)):
        if i % job["of"] == job["index"]:
            path, steps = write_game(Path(job["out"]) / "json_2.1.1" / FOLDERS[split], game, engine)
            row = {"split": split, "number": number, "id": f"{FOLDERS[split]}/{game.folder}"}
            row |= {"task_type": game.task_type, "steps": steps, "sha256": file_hash(path)}
            lines.write(json.dumps(row) + "\n")
            lines.flush()


def sample_games(options: HouseholdOptions) -> Iterator[tuple[str, int, Game]]:
    """Draw all games of `options` as (split, number, game); no two have the same content, in whatever splits.

    `train` and `iid` share ALFRED's training floor plans; `ood` has its held-out ones.

    Raises:
        UserError: the options leave no room for so many different games.
    """
    constants, _ = alfred()
    seen: set[tuple[Any, ...]] = set()
    for split in FOLDERS:
        scenes = constants.TEST_SCENE_NUMBERS if split == "ood" else constants.TRAIN_SCENE_NUMBERS
        rng = random.Random(f"{options.seed}/{split}")
        for number in range(options.counts.get(split, 0)):
            task_type = options.task_types[number % len(options.task_types)]
            kinds = sorted(constants.GOALS_VALID[task_type])
            rooms = [s for s in scenes if any(s in constants.SCENE_TYPE[kind] for kind in kinds)]
            for _ in range(_DRAWS_PER_GAME):
                game = sample_game(
                    task_type,
                    rng.choice(rooms),
                    rng,
                    max_copies=options.max_copies,
                    density=options.density,
                    max_receptacles=options.max_receptacles,
                )
                if game is not None and game.content not in seen:
                    break
            else:
                raise UserError(
                    f"counts.{split} is {options.counts[split]}, but these options give only about {number} different "
                    "games; lower it, or raise density, max_copies or max_receptacles"
                )
            seen.add(game.content)
            yield split, number, game


if __name__ == "__main__":
    try:
        _work(json.loads(sys.argv[1]))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(3)
