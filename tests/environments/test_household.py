"""The generator of household games: what it promises about rooms, splits, bytes and its cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from epo.environments import household
from epo.environments._household_games import alfred, load_room
from epo.environments.alfworld import HouseholdSuite
from epo.environments.household import FOLDERS, TASK_TYPES, HouseholdOptions, ensure_games, sample_games
from epo.errors import EnvironmentFailure, UserError

SMALL = {"max_receptacles": 4, "max_copies": 1, "density": 0.2}
COUNTS = {"train": 6, "iid": 2, "ood": 6}


def tree(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def made(cache):
    return ensure_games(HouseholdOptions(counts=COUNTS, **SMALL), cache=cache)


def test_bytes_depend_on_the_options_only(made, tmp_path, monkeypatch):
    folder, _ = made
    for hash_seed, processes in (("1", 1), ("777", 3)):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        options = HouseholdOptions(counts=COUNTS, **SMALL)
        again, _ = ensure_games(options, cache=tmp_path / hash_seed, processes=processes)
        assert again.name == folder.name
        assert tree(again) == tree(folder)


def test_another_seed_gives_other_games():
    draws = []
    for seed in (0, 0, 1):
        options = HouseholdOptions(counts={"train": 6}, seed=seed)
        draws.append([game.problem for _, _, game in sample_games(options)])
    assert draws[0] == draws[1]
    assert not set(draws[0]) & set(draws[2])


def test_ood_games_are_in_alfreds_held_out_floor_plans_and_the_others_never():
    options = HouseholdOptions(counts={"train": 60, "iid": 60, "ood": 60})
    scenes = {split: set() for split in FOLDERS}
    for split, _, game in sample_games(options):
        scenes[split].add(game.scene)
    held_out = {room + n for room in (0, 200, 300, 400) for n in range(1, 7)}
    assert scenes["ood"] <= held_out
    assert not (scenes["train"] | scenes["iid"]) & held_out
    assert len(scenes["ood"]) > 12 and len(scenes["train"]) > 30


def test_no_two_games_of_any_splits_are_alike_to_the_agent():
    seen = Counter()
    for _, _, game in sample_games(HouseholdOptions(counts={"train": 90, "iid": 90, "ood": 90}, **SMALL)):
        lying = frozenset(Counter((o.split("|")[0], r) for o, r in game.placed.items()).items())
        seen[game.scene, game.description, frozenset(game.poses), lying] += 1
    assert len(seen) == 270 and set(seen.values()) == {1}


@pytest.mark.parametrize("limit", [3, 5, None])
def test_trimmed_rooms_have_at_most_so_many_of_the_floor_plans_receptacles(limit):
    for _, _, game in sample_games(HouseholdOptions(counts={"train": 36, "ood": 12}, max_receptacles=limit)):
        whole = load_room(game.scene).poses
        assert game.poses.items() <= whole.items()
        assert len(game.poses) == (len(whole) if limit is None else min(limit, len(whole)))
        assert set(game.placed.values()) <= set(game.poses)


def test_knobs_bound_the_objects():
    options = HouseholdOptions(counts={"train": 60}, max_copies=2, density=0.0)
    for _, _, game in sample_games(options):
        kinds = Counter(o.split("|")[0] for o in game.placed)
        assert set(kinds) <= {game.target, "DeskLamp", "FloorLamp"}  # density 0 leaves the target and the lamps
        assert 1 <= kinds[game.target] <= 2
        assert kinds[game.target] == 2 or game.task_type != "pick_two_obj_and_place"
    full = HouseholdOptions(counts={"train": 12}, max_copies=1, density=1.0)
    crowd = [len(game.placed) for _, _, game in sample_games(full)]
    assert min(crowd) > 5


def test_target_objects_never_start_in_the_receptacle_asked_for():
    for _, _, game in sample_games(HouseholdOptions(counts={"train": 120}, **SMALL)):
        homes = [r for o, r in game.placed.items() if o.split("|")[0] == game.target]
        assert homes
        assert not any(game.parent and game.parent in (r.split("|")[0], r.split("|")[-1]) for r in homes)


def test_task_types_take_turns(made):
    _, manifest = made
    for split, count in COUNTS.items():
        types = [game["task_type"] for game in manifest["games"][split]]
        assert types == [TASK_TYPES[i % 6] for i in range(count)]


def test_manifest_tells_what_was_made(made):
    folder, manifest = made
    assert manifest["options"]["counts"] == COUNTS
    assert "not the published" in manifest["note"]
    for split, games in manifest["games"].items():
        for game in games:
            assert game["id"].startswith(FOLDERS[split] + "/")
            path = folder / "json_2.1.1" / game["id"] / "game.tw-pddl"
            assert len(json.loads(path.read_text())["walkthrough"]) == game["steps"]


def test_a_complete_cache_is_used_as_it_is(made, cache, monkeypatch):
    monkeypatch.setattr(household, "_make_games", lambda *_: pytest.fail("made again"))
    assert ensure_games(HouseholdOptions(counts=COUNTS, **SMALL), cache=cache) == made


@pytest.mark.parametrize("damage", ["manifest", "game", "truncated"])
def test_a_damaged_cache_is_made_again(damage, tmp_path):
    options = HouseholdOptions(counts={"train": 1, "iid": 0, "ood": 0}, **SMALL)
    seen = []
    folder, manifest = ensure_games(options, cache=tmp_path, progress=lambda *call: seen.append(call))
    before = tree(folder)
    game = folder / "json_2.1.1" / manifest["games"]["train"][0]["id"] / "game.tw-pddl"
    if damage == "truncated":
        game.write_bytes(game.read_bytes()[:-100])
    else:
        (game if damage == "game" else folder / "manifest.json").unlink()
    again, _ = ensure_games(options, cache=tmp_path, progress=lambda *call: seen.append(call))
    assert again == folder and tree(again) == before
    assert seen == [(1, 1), (1, 1)]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # nothing half-made is left


def test_an_interrupted_generation_leaves_nothing(tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    options = HouseholdOptions(counts={"train": 2, "iid": 0, "ood": 0}, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        ensure_games(options, cache=tmp_path, progress=interrupt)
    assert list((tmp_path / "household").iterdir()) == []


def test_an_engine_that_hangs_ends_the_generation(tmp_path, monkeypatch):
    (tmp_path / "textworld.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pids')!r}, 'a').write(f'{{os.getpid()}}\\n')\ntime.sleep(1000)"
    )
    monkeypatch.syspath_prepend(tmp_path)  # found first by the processes that make the games
    monkeypatch.setattr(household, "GAME_SECONDS", 0.5)
    wait, waits = household.wait_readable, []

    def once_started(*arguments):
        while not waits and not (tmp_path / "pids").is_file():
            time.sleep(0.05)
        waits.append(arguments)
        return wait(*arguments)

    monkeypatch.setattr(household, "wait_readable", once_started)
    options = HouseholdOptions(counts={"train": 2, "iid": 0, "ood": 0}, **SMALL)
    with pytest.raises(EnvironmentFailure, match=r"no household game was made for 0\.5 s, after 0 of 2"):
        ensure_games(options, cache=tmp_path / "cache", processes=1)
    assert list((tmp_path / "cache/household").iterdir()) == []
    (pid,) = (tmp_path / "pids").read_text().split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_listing_tasks_needs_neither_the_engine_nor_the_users_home(made, cache, tmp_path):
    program = f"""
import json, os, sys
from epo.environments.alfworld import HouseholdSuite
suite = HouseholdSuite(counts={COUNTS}, cache={cache!r}, **{SMALL})
ids = [t.id for split in suite.splits for t in suite.tasks(split)]
light = not [m for m in sys.modules if m.split(".")[0] in ("alfworld", "textworld", "fast_downward")]
suite.make_env().reset(suite.tasks("train")[0])
print(json.dumps([ids, light, sys.argv, os.environ.get("ALFWORLD_DATA"), os.listdir({str(tmp_path)!r})]))
"""
    env = {k: v for k, v in os.environ.items() if k != "ALFWORLD_DATA"} | {"HOME": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", program, "mine"], env=env, capture_output=True, text=True, check=True)
    ids, light, argv, data, home = json.loads(out.stdout)
    assert ids == [game["id"] for games in made[1]["games"].values() for game in games]
    assert light
    assert argv == ["-c", "mine"] and data is None and home == []


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"counts": {"train": -1}}, "counts.train"),
        ({"counts": {"test": 1}}, "'test'"),
        ({"counts": {"train": True}}, "counts.train"),
        ({"seed": "a"}, "seed"),
        ({"max_copies": 0}, "max_copies"),
        ({"density": 1.5}, "density"),
        ({"density": float("nan")}, "density"),
        ({"max_receptacles": 2}, "max_receptacles"),
        ({"task_types": ["pick_and_place"]}, "pick_and_place_simple"),
        ({"task_types": []}, "task_types"),
    ],
)
def test_wrong_options_are_named(options, field):
    with pytest.raises(UserError, match=re.escape(field)):
        HouseholdSuite(**options)


def test_more_games_than_there_are_is_a_users_mistake(monkeypatch):
    constants, _ = alfred()
    monkeypatch.setattr(constants, "TRAIN_SCENE_NUMBERS", [401])
    options = HouseholdOptions(counts={"train": 10_000}, max_copies=1, density=0.0, task_types=TASK_TYPES[:1])
    with pytest.raises(UserError, match=r"counts\.train is 10000.*only about \d+ different"):
        list(sample_games(options))


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="EPO_CACHE"):
        ensure_games(HouseholdOptions(counts={"train": 1}), cache=tmp_path / "file")
