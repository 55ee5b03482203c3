"""ALFWorld's suites on the real engine. The stock engine, in a process of its own, is the reference."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from epo.environments import make_suite
from epo.environments.alfworld import AlfworldEnv, AlfworldSuite, HouseholdSuite
from epo.environments.household import FOLDERS, TASK_TYPES
from epo.errors import EnvironmentFailure, UserError
from epo.types import Task

# Plays games with the engine as installed, or with ours: the walkthrough, then random actions. Prints what was said.
PLAYER = """
import hashlib, json, random, sys, time
import textworld
from textworld.envs import PddlEnv
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
mode, steps, paths = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
if mode == "memo":
    from epo.environments._textworld_memo import install
    install()
env = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True, policy_commands=len(paths) == 1)))
digests, won, seconds = [], [], 0.0
for path in paths:
    told = hashlib.sha256()
    hear = lambda s: told.update(
        json.dumps([s["feedback"], s["admissible_commands"], s["won"], s.get("policy_commands")]).encode())
    game = json.load(open(path))
    env.load(game)
    state = env.reset()
    hear(state)
    for command in game["walkthrough"]:
        state, score, done = env.step(command)
        hear(state)
    won.append(state["won"] and done and score == 1)
    state, rng = env.reset(), random.Random(0)
    began = time.process_time()
    for _ in range(steps):
        state, _, _ = env.step(rng.choice([*state["admissible_commands"], "dance"]))
        hear(state)
    seconds += time.process_time() - began
    digests.append(told.hexdigest())
print(json.dumps({"digests": digests, "won": won, "seconds": seconds}))
"""


def play(mode: str, steps: int, paths: list[Path], **env: str) -> dict:
    command = [sys.executable, "-c", PLAYER, mode, str(steps), *map(str, paths)]
    # Unless it is told a folder that exists, the stock package makes one in the user's home.
    env |= {"ALFWORLD_DATA": str(paths[0].parent)}
    out = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def suite(cache):
    """Whole floor plans, one of each task type."""
    suite = HouseholdSuite(counts={"train": 6, "iid": 0, "ood": 0}, cache=cache)
    suite.prepare()
    return suite


@pytest.fixture(scope="module")
def easy(cache):
    return HouseholdSuite(
        counts={"train": 6, "iid": 2, "ood": 6}, max_receptacles=4, max_copies=1, density=0.2, cache=cache
    )


@pytest.fixture(scope="module")
def env(suite):
    with suite.make_env() as env:
        yield env


@pytest.fixture(scope="module")
def easy_env(easy):
    with easy.make_env() as env:
        yield env


def files(suite: HouseholdSuite, split: str = "train") -> list[Path]:
    folder = suite._games()[0] / "json_2.1.1"
    return [folder / task.id / "game.tw-pddl" for task in suite.tasks(split)]


def transcript(env: AlfworldEnv, task: Task, *, steps: int = 15) -> str:
    rng, observation, said = random.Random(1), env.reset(task), []
    said.append(observation)
    for _ in range(steps):
        step = env.step(rng.choice(observation.admissible_actions))
        said.append(step)
        observation = step.observation
        if step.terminated:
            break
    return hashlib.sha256(repr(said).encode()).hexdigest()


def test_the_faster_engine_says_the_same_as_the_stock_engine_and_is_faster(suite):
    by_type = {task.goal: path for task, path in zip(suite.tasks("train"), files(suite), strict=True)}
    paths = [by_type[t] for t in (TASK_TYPES[1], TASK_TYPES[4], TASK_TYPES[5])]
    stock, memo = play("stock", 25, paths), play("memo", 25, paths, PYTHONHASHSEED="7")
    assert memo["digests"] == stock["digests"]
    assert all(stock["won"])  # the stored walkthroughs win in the stock engine, too
    assert stock["seconds"] / memo["seconds"] > 3


def test_the_planner_is_left_as_it_is(easy):
    stock, memo = (play(mode, 5, files(easy)[:1]) for mode in ("stock", "memo"))
    assert memo["digests"] == stock["digests"]


def test_walkthroughs_of_all_task_types_win_with_their_last_action(suite, easy, env, easy_env):
    played = set()
    for tasks, one in ((suite.tasks("train"), env), (easy.tasks("train"), easy_env), (easy.tasks("ood"), easy_env)):
        for task in tasks:
            observation = one.reset(task)
            *before, last = one.demonstration(task)
            for action in before:
                assert action in observation.admissible_actions
                step = one.step(action)
                observation = step.observation
                assert (step.reward, step.success, step.terminated, step.score) == (0.0, False, False, 0.0)
                assert step.understood
            step = one.step(last)
            assert (step.reward, step.success, step.terminated, step.truncated, step.score) == (1, True, True, False, 1)
            played.add(task.goal)
    assert played == set(TASK_TYPES)


def test_first_observation_separates_room_and_goal(env, suite):
    for task in suite.tasks("train"):
        first = env.reset(task)
        kind, target, _, parent_or_lamp, _ = task.id.split("/")[1].split("-")
        assert first.text.startswith("You are in the middle of a room.")
        assert "task" not in first.text and "=-" not in first.text
        assert target.lower() in first.goal and not first.goal.startswith(" ")
        assert kind == "look_at_obj_in_light" or parent_or_lamp.lower() in first.goal
        assert "help" not in first.admissible_actions and "look" in first.admissible_actions
        later = env.step("look").observation
        assert later.goal is None


def test_trimmed_rooms_show_few_receptacles(easy, easy_env):
    for split in easy.splits:
        for task in easy.tasks(split):
            assert len(re.findall(r"\ba \w+ \d+", easy_env.reset(task).text)) == 4


ODD = ["", "   ", "\n", "\ud800", "go to", "GO TO SHELF 1", "{r.name}", "#look.feedback#", "%s", "x" * 10_000]
ODD += ["\x00", "look\nlook", "抽屉", "🙂", "help me", "go to nowhere 1", "'; drop", "look\ud800"]


def test_odd_input_is_answered_and_changes_nothing(easy_env, easy):
    before = easy_env.reset(easy.tasks("train")[0]).admissible_actions
    for action in [*ODD, None, 7, b"look", ["look"]]:
        step = easy_env.step(action)
        assert not step.understood and not step.success and not step.terminated and step.reward == 0
        assert step.observation.text == "Nothing happens."
        assert step.observation.admissible_actions == before


def test_outer_blanks_do_not_matter_and_help_is_understood(easy_env, easy):
    task = easy.tasks("train")[0]
    action = next(a for a in easy_env.reset(task).admissible_actions if a.startswith("go to"))
    plain = easy_env.step(action)
    easy_env.reset(task)
    assert easy_env.step(f"  \n{action}\t ") == plain
    assert easy_env.step("help").understood


def test_every_action_offered_is_understood(env, suite):
    rng = random.Random(3)
    for task in suite.tasks("train")[:3]:
        observation = env.reset(task)
        for _ in range(15):
            step = env.step(rng.choice(observation.admissible_actions))
            assert step.understood and step.observation.text
            observation = step.observation


def test_episodes_do_not_depend_on_what_was_played_before(easy, easy_env):
    tasks = easy.tasks("train")[:3]
    first = [transcript(easy_env, task) for task in tasks]
    assert [transcript(easy_env, task) for task in reversed(tasks)] == first[::-1]
    with easy.make_env() as fresh:
        assert transcript(fresh, tasks[2]) == first[2]
        assert transcript(fresh, tasks[2]) == first[2]


def test_episodes_are_the_same_in_other_processes(easy, easy_env, cache):
    task = easy.tasks("train")[5]
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_alfworld import AlfworldEnv, Path, Task, transcript
print(transcript(AlfworldEnv(Path({str(easy._games()[0] / "json_2.1.1")!r})), Task(suite="", id={task.id!r}, split="")))
"""
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == transcript(easy_env, task)


def test_the_callers_process_is_left_alone(easy, monkeypatch):
    argv = ["program", "--its", "option"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("ALFWORLD_DATA", "/nowhere/at/all")
    stdout = sys.stdout
    with easy.make_env() as env:
        for task in easy.tasks("ood")[:2]:
            env.reset(task)
            env.step("look")
    assert sys.argv is argv and argv == ["program", "--its", "option"]
    assert os.environ["ALFWORLD_DATA"] == "/nowhere/at/all" and not Path("/nowhere").exists()
    assert sys.stdout is stdout


def test_an_ended_episode_takes_no_step(easy, easy_env):
    task = easy.tasks("train")[0]
    easy_env.reset(task)
    for action in easy_env.demonstration(task):
        easy_env.step(action)
    with pytest.raises(RuntimeError, match="reset"):
        easy_env.step("look")
    with easy.make_env() as fresh, pytest.raises(RuntimeError, match="reset"):
        fresh.step("look")


def test_engine_trouble_is_the_environments_failure_and_passes(easy, tmp_path, monkeypatch):
    good = easy.tasks("train")[0]
    folder = tmp_path / "json_2.1.1"
    shutil.copytree(easy._games()[0] / "json_2.1.1", folder)
    game = json.loads((folder / good.id / "game.tw-pddl").read_text())
    for name, text in {
        "text": "no json",
        "problem": json.dumps(game | {"pddl_problem": "(define"}),
        "grammar": json.dumps(game | {"grammar": game["grammar"].replace("Your task is to:", "Do")}),
    }.items():
        (folder / name).mkdir()
        (folder / name / "game.tw-pddl").write_text(text)
    with AlfworldEnv(folder) as env:
        expected = transcript(env, good)
        for bad in ("absent", "text", "problem", "grammar"):
            with pytest.raises(EnvironmentFailure, match=bad):
                env.reset(Task(suite="alfworld", id=bad, split="train"))
            assert transcript(env, good) == expected

        def broken(command: str) -> None:
            raise IndexError("engine")

        env.reset(good)
        with monkeypatch.context() as patch:
            patch.setattr(env._engine, "step", broken)
            with pytest.raises(EnvironmentFailure, match="look"):
                env.step("look")
        assert transcript(env, good) == expected


@pytest.mark.parametrize("place", ["../secret", "train/../../secret", "{}/secret", "secret\0"])
def test_task_ids_lead_nowhere_else(easy, tmp_path, place):
    """The game is there and could be played; it lies outside."""
    task = easy.tasks("train")[0]
    games = tmp_path / "games"
    shutil.copytree(easy.make_env()._games / task.id, tmp_path / "secret")
    games.mkdir()
    with AlfworldEnv(games) as env, pytest.raises(UserError, match="must be a folder below"):
        env.reset(Task(suite="household", id=place.format(tmp_path), split="train"))


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"solvable": true, "x": NaN', "\x00"])
def test_damaged_published_games_are_named(published, text):
    game = next((published / "json_2.1.1/train").glob("pick_and_place_simple-*/trial_T*/game.tw-pddl"))
    game.write_text(text)
    with pytest.raises(UserError, match="is not valid JSON"):
        AlfworldSuite(data=str(published)).tasks("train")


def test_household_provenance_is_plain_about_what_the_games_are(easy, suite):
    provenance = easy.provenance()
    assert "not the published" in provenance["note"]
    assert {"alfworld", "textworld"} <= set(provenance["versions"])
    assert len(provenance["games_sha256"]) == 64 and provenance["games_sha256"] != suite.provenance()["games_sha256"]
    json.dumps(provenance)


def test_unknown_splits_are_named(easy):
    with pytest.raises(UserError, match=r"'test'.*train, iid, ood"):
        easy.tasks("test")


@pytest.fixture
def published(easy, tmp_path, monkeypatch):
    """A tree as `alfworld-download` leaves it, with games in it that must not be played."""
    monkeypatch.setenv("EPO_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    shutil.copytree(easy._games()[0] / "json_2.1.1", root / "json_2.1.1")
    train = root / "json_2.1.1" / "train"
    good = next(train.glob("pick_and_place_simple-*/trial_T*"))
    game = json.loads((good / "game.tw-pddl").read_text())
    for name, change in {
        "pick_and_place_simple-Mug-None-Shelf-301/trial_unsolvable": {"solvable": False},
        "pick_and_place_simple-Mug-None-Shelf-301/trial_unchecked": {"solvable": None},
        "pick_and_place_with_movable_recep-Fork-Mug-Shelf-301/trial_movable": {},
        "pick_clean_then_place_in_recep-AppleSliced-None-Fridge-11/trial_sliced": {},
        "pick_and_place_simple-Mug-None-Shelf-302/trial_without_trajectory": {},
    }.items():
        shutil.copytree(good, train / name)
        (train / name / "game.tw-pddl").write_text(json.dumps(game | change))
    (train / "pick_and_place_simple-Mug-None-Shelf-302/trial_without_trajectory/traj_data.json").unlink()
    (train / "pick_and_place_simple-Mug-None-Shelf-303/trial_without_game").mkdir(parents=True)
    return root


def test_published_data_is_read_without_what_alfworlds_loader_skips(published, easy):
    suite = AlfworldSuite(data=str(published))
    for split in suite.splits:
        ids = [task.id for task in suite.tasks(split)]
        assert ids == sorted(task.id for task in easy.tasks(split))
        assert all(i.startswith(FOLDERS[split] + "/") for i in ids)
        assert all(t.goal in TASK_TYPES and t.split == split and t.suite == "alfworld" for t in suite.tasks(split))
    with suite.make_env() as env:
        task = suite.tasks("ood")[0]
        env.reset(task)
        assert [env.step(action) for action in env.demonstration(task)][-1].success
    some = AlfworldSuite(data=str(published), task_types=["look_at_obj_in_light"])
    assert {task.goal for task in some.tasks("train")} == {"look_at_obj_in_light"}
    assert suite.provenance()["games"] == {split: len(easy.tasks(split)) for split in suite.splits}


def test_alfworlds_own_loader_finds_the_same_games(published):
    program = f"""
import sys
from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv
config = {{"dataset": {{"data_path": {str(published / "json_2.1.1/train")!r}, "num_train_games": -1}},
          "env": {{"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6]}}}}
print(*AlfredTWEnv(config, train_eval="train").game_files, sep="\\n", file=sys.stderr)
"""
    env = os.environ | {"ALFWORLD_DATA": str(published)}
    out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    found = {line for line in out.stderr.splitlines() if line.endswith("game.tw-pddl")}
    ours = AlfworldSuite(data=str(published)).tasks("train")
    assert found == {str(published / "json_2.1.1" / task.id / "game.tw-pddl") for task in ours}


def test_the_index_is_kept_and_follows_the_files(published, monkeypatch):
    before = AlfworldSuite(data=str(published)).tasks("train")
    with monkeypatch.context() as patch:
        patch.setattr("epo.environments.alfworld._is_solvable", lambda path: pytest.fail("scanned again"))
        assert AlfworldSuite(data=str(published)).tasks("train") == before
    unsolvable = published / "json_2.1.1" / before[0].id / "game.tw-pddl"
    unsolvable.write_text(json.dumps(json.loads(unsolvable.read_text()) | {"solvable": False}))
    assert AlfworldSuite(data=str(published)).tasks("train") == before[1:]


def test_missing_data_names_the_place_and_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(UserError, match=r"ALFWORLD_DATA is not set.*alfworld-download.*household"):
        AlfworldSuite()
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=rf"{tmp_path}/nowhere.*alfworld-download.*household"):
        AlfworldSuite()
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(UserError, match=r"there is no folder .*nowhere/json_2\.1\.1"):
        make_suite("alfworld")
    (tmp_path / "nowhere" / "json_2.1.1").mkdir()
    with pytest.raises(UserError, match=r"no playable game in .*json_2\.1\.1/train"):
        make_suite("alfworld").tasks("train")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "alfworld" else object())
    with pytest.raises(UserError, match=r"package alfworld, .*pip install -e '.\[alfworld\]'"):
        HouseholdSuite().prepare()
