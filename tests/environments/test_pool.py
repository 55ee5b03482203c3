"""Whatever happens to the workers, the pool answers as an undisturbed environment would, or says that it cannot."""

from __future__ import annotations

import logging
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epo.environments import make_suite, register_suite
from epo.environments._replies import checked
from epo.environments._worker import Lost, Worker
from epo.environments.pool import EnvPool, Job, Request
from epo.errors import EnvironmentFailure, UserError
from epo.types import Observation, Step, Task

register_suite("faulty", "faulty_suites:FaultySuite")

SUITE = make_suite("corridor")
TASKS = SUITE.tasks("train")


def is_alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.02)


def noted(log: Path, word: str) -> list[int]:
    """The process ids that faulty environments wrote down."""
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith(word + " ")]


def actions_of(task: Task) -> list[str]:
    """Right, wrong and senseless words that do not end the episode."""
    rng = random.Random(task.id)
    return [*rng.choices(["push", "pull", "slide", "sing"], k=4), "sing", "  PUSH "]


def undisturbed(task: Task) -> list[Observation | Step]:
    with SUITE.make_env() as env:
        return [env.reset(task), *(env.step(action) for action in actions_of(task))]


def play(pool: EnvPool, task: Task, *, slot: int = 0) -> list[Observation | Step | EnvironmentFailure]:
    heard: list[Observation | Step | EnvironmentFailure] = [pool.wait(pool.submit_reset(slot, task))]
    for action in actions_of(task):
        if isinstance(heard[-1], EnvironmentFailure):
            break
        heard.append(pool.wait(pool.submit_step(slot, action)))
    return heard


def episode(task: Task) -> Job[list[Observation | Step]]:
    heard: list[Observation | Step] = [(yield Request("reset", task))]
    for action in actions_of(task):
        heard.append((yield Request("step", action)))
    return heard


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.touch()
    return path


@pytest.mark.parametrize("size", [1, 3])
def test_results_are_those_of_the_environment_itself_for_any_size(size: int):
    with EnvPool("corridor", size=size) as pool:
        assert pool.map(episode, TASKS[:20]) == [undisturbed(task) for task in TASKS[:20]]
        assert pool.stats().restarts == {"died": 0, "hung": 0, "failed": 0}


def test_slots_work_at_the_same_time_and_results_keep_the_order_asked_for():
    with EnvPool("corridor", size=2) as pool:
        pending = [pool.submit_reset(1, TASKS[1]), pool.submit_reset(0, TASKS[0])]
        assert pool.gather(pending) == [undisturbed(TASKS[1])[0], undisturbed(TASKS[0])[0]]
        mixed = pool.gather([pool.submit_step(0, actions_of(TASKS[0])[0]), pool.submit_reset(1, TASKS[2])])
        assert mixed == [undisturbed(TASKS[0])[1], undisturbed(TASKS[2])[0]]


def test_killed_workers_go_unnoticed(log: Path, caplog: pytest.LogCaptureFixture):
    """Killed before, between and during calls; twice in one episode."""
    task = TASKS[0]
    with EnvPool("faulty", {"log": str(log)}, size=1) as pool:
        heard = [pool.wait(pool.submit_reset(0, task))]
        for number, action in enumerate(actions_of(task)):
            if number in (1, 4):
                os.kill(noted(log, "worker")[-1], signal.SIGKILL)
            heard.append(pool.wait(pool.submit_step(0, action)))
        assert heard == undisturbed(task)
        assert pool.restarts(0) == 2
        assert len(set(noted(log, "worker"))) == 3
        assert pool.stats().restarts["died"] == 2
        assert play(pool, TASKS[1]) == undisturbed(TASKS[1])
        assert pool.restarts(0) == 0, "counted per episode"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert f"(pid {noted(log, 'worker')[0]}) died" in warnings[0] and "SIGKILL" in warnings[0]
    assert "replaying 2 calls" in warnings[0] and "replaying 5 calls" in warnings[1]


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    ("fault", "cause"),
    [("exit", "died"), ("crash", "died"), ("hang", "hung"), ("raise", "failed"), ("environment failure", "failed")],
)
def test_a_fault_costs_a_restart_and_nothing_else(
    fault: str, cause: str, at: int, log: Path, caplog: pytest.LogCaptureFixture
):
    options = {"log": str(log), "fault": fault, "at": at}
    # A worker's first call, the reset, has the slow limit.
    limits = {"timeout_seconds": 2.0, "slow_timeout_seconds": 3.0 if at == 0 else 60.0} if fault == "hang" else {}
    with EnvPool("faulty", options, size=1, **limits) as pool:
        assert play(pool, TASKS[0]) == undisturbed(TASKS[0])
        assert log.read_text().count("fault") == 1
        assert pool.stats().restarts == {"died": 0, "hung": 0, "failed": 0} | {cause: 1}
        assert pool.stats().failures == 0
    in_log = {"exit": "exit code 3", "crash": "Segmentation fault", "hang": "no answer before the deadline"}
    assert in_log.get(fault, "in misbehave") in caplog.text, (
        "what the log tells of the cause; a traceback if there is one"
    )


def test_a_stopped_process_is_replaced(log: Path):
    with EnvPool("faulty", {"log": str(log)}, size=1, timeout_seconds=2.0) as pool:
        heard = [pool.wait(pool.submit_reset(0, TASKS[0]))]
        stopped = noted(log, "worker")[0]
        os.kill(stopped, signal.SIGSTOP)
        heard += [pool.wait(pool.submit_step(0, action)) for action in actions_of(TASKS[0])]
        assert heard == undisturbed(TASKS[0])
        assert pool.stats().restarts["hung"] == 1
        wait_until_gone([stopped])


@pytest.mark.parametrize("max_restarts", [0, 2])
def test_an_episode_that_cannot_live_becomes_a_failure_and_harms_no_other(max_restarts: int, log: Path):
    options = {"log": str(log), "fault": "raise", "times": 99, "only": TASKS[0].id}
    with EnvPool("faulty", options, size=2, max_restarts=max_restarts) as pool:
        *before, failure = play(pool, TASKS[0])
        assert before == undisturbed(TASKS[0])[:2]
        assert isinstance(failure, EnvironmentFailure) and "StrangeError: bolts and nuts" in str(failure)
        assert log.read_text().count("fault") == max_restarts + 1
        assert pool.restarts(0) == max_restarts
        assert pool.stats().failures == 1
        with pytest.raises(RuntimeError, match="no episode"):
            pool.submit_step(0, "push")
        assert play(pool, TASKS[1]) == undisturbed(TASKS[1])

        results = pool.map(episode, TASKS[:4])
        assert isinstance(results[0], EnvironmentFailure)
        assert results[1:] == [undisturbed(task) for task in TASKS[1:4]]


def test_a_replay_that_differs_is_a_failure_not_a_wrong_episode(log: Path):
    with EnvPool("faulty", {"log": str(log), "fault": "nondeterministic"}, size=1) as pool:
        pool.wait(pool.submit_reset(0, TASKS[0]))
        pool.wait(pool.submit_step(0, "push"))
        os.kill(noted(log, "worker")[-1], signal.SIGKILL)
        failure = pool.wait(pool.submit_step(0, "push"))
        assert isinstance(failure, EnvironmentFailure) and "not deterministic" in str(failure)
        assert isinstance(pool.wait(pool.submit_reset(0, TASKS[1])), Observation)


def test_no_descendant_survives_a_restart_or_the_end(log: Path):
    options = {"log": str(log), "fault": "hang", "at": 1, "only": TASKS[0].id, "child": True}
    with EnvPool("faulty", options, size=2, timeout_seconds=60.0) as pool:
        pool.gather([pool.submit_reset(0, TASKS[0]), pool.submit_reset(1, TASKS[1])])
        first = noted(log, "child") + noted(log, "worker")
        assert len(first) == 4 and all(map(is_alive, first))
        os.kill(noted(log, "worker")[0], signal.SIGKILL)
        os.kill(noted(log, "worker")[1], signal.SIGKILL)
        pool.gather([pool.submit_reset(0, TASKS[2]), pool.submit_reset(1, TASKS[2])])
        wait_until_gone(first)
        second = [pid for pid in noted(log, "child") + noted(log, "worker") if pid not in first]
        assert len(second) == 4 and all(map(is_alive, second))
        pool.gather([pool.submit_reset(0, TASKS[0])])
        pool.submit_step(0, "push")  # hangs: the pool is closed on it
    wait_until_gone(second)
    assert len(noted(log, "closed")) == 1, "the idle worker may tidy up, the hung one cannot"
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit_reset(0, TASKS[0])
    pool.close()


PARENT = """
import sys
sys.path.insert(0, {tests!r})
from epo.environments import make_suite, register_suite
from epo.environments.pool import EnvPool
register_suite("faulty", "faulty_suites:FaultySuite")
tasks = make_suite("corridor").tasks("train")
options = dict(log={log!r}, fault="hang", at=1, only=tasks[0].id, child=True)
pool = EnvPool("faulty", options, size=2)
pool.gather([pool.submit_reset(0, tasks[0]), pool.submit_reset(1, tasks[1])])
pending = pool.submit_step(0, "push")
pool.wait(pool.submit_step(1, "push"))
print("ready", flush=True)
{ending}
"""


@pytest.mark.parametrize("ending", ["pool.wait(pending)", "sys.exit()"])
def test_no_process_survives_its_parent(ending: str, log: Path):
    """The parent is killed without warning, or exits without closing; one worker hangs, the other is idle."""
    code = PARENT.format(tests=str(Path(__file__).parent), log=str(log), ending=ending)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        pids = noted(log, "worker") + noted(log, "child")
        assert len(pids) == 4
        if "wait" in ending:
            assert all(map(is_alive, pids))
            parent.kill()
    wait_until_gone(pids)


def test_interrupts_do_not_reach_workers(log: Path):
    with EnvPool("faulty", {"log": str(log)}, size=1) as pool:
        pool.wait(pool.submit_reset(0, TASKS[0]))
        worker = noted(log, "worker")[0]
        assert os.getpgid(worker) != os.getpgid(0), "Ctrl-C goes to the terminal's foreground process group"
        os.kill(worker, signal.SIGINT)
        assert play(pool, TASKS[0]) == undisturbed(TASKS[0])
        assert noted(log, "worker") == [worker]


def test_user_errors_arrive_as_user_errors(log: Path):
    with EnvPool("corridor", {"length": 0}, size=2) as pool:
        pending = [pool.submit_reset(0, TASKS[0]), pool.submit_reset(1, TASKS[1])]
        with pytest.raises(UserError, match="'length' must be at least 1, not 0"):
            pool.gather(pending)
        with pytest.raises(UserError, match="'length' must be at least 1"):
            pool.wait(pool.submit_reset(1, TASKS[1]))
    with EnvPool("faulty", {"log": str(log), "fault": "user error", "at": 0, "times": 99}, size=2) as pool:
        with pytest.raises(UserError, match="no such task, choose another"):
            pool.map(episode, TASKS[:4])
        assert isinstance(pool.wait(pool.submit_demonstration(0, TASKS[0])), list), "the pool stays usable"
        assert pool.stats().restarts == {"died": 0, "hung": 0, "failed": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be at least 1, not 0"),
        ({"size": 1, "timeout_seconds": 0.0}, "timeout_seconds must be above 0"),
        ({"size": 1, "slow_timeout_seconds": float("nan")}, "slow_timeout_seconds must be above 0"),
        ({"size": 1, "max_restarts": -1}, "max_restarts must be at least 0, not -1"),
        ({"size": 1, "worker_memory_mb": float("nan")}, "worker_memory_mb must be above 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        EnvPool("corridor", **arguments)
    with pytest.raises(UserError, match="did you mean 'corridor'"):
        EnvPool("coridor", size=1)


def test_misuse_is_refused():
    with EnvPool("corridor", size=1) as pool:
        with pytest.raises(RuntimeError, match="no episode"):
            pool.submit_step(0, "push")
        pending = pool.submit_reset(0, TASKS[0])
        with pytest.raises(RuntimeError, match="gather the last call"):
            pool.submit_step(0, "push")
        with pytest.raises(RuntimeError, match="map needs all slots"):
            pool.map(episode, TASKS[:1])
        pool.wait(pending)
        with pytest.raises(RuntimeError, match="gathered already"):
            pool.wait(pending)
        pool.wait(pool.submit_demonstration(0, TASKS[0]))
        with pytest.raises(RuntimeError, match="no episode"):
            pool.submit_step(0, "push")


def test_noise_stays_out_of_the_terminal(log: Path, capfd: pytest.CaptureFixture[str]):
    with EnvPool("faulty", {"log": str(log), "fault": "noise"}, size=1) as pool:
        assert play(pool, TASKS[0]) == undisturbed(TASKS[0])
    assert "noise" not in "".join(capfd.readouterr())


def test_workers_are_light_and_large_answers_are_cut(log: Path):
    with EnvPool("faulty", {"log": str(log), "fault": "modules"}, size=1) as pool:
        modules = play(pool, TASKS[0])[1].observation.text.split()
    assert "epo.types" in modules
    assert not {"numpy", "torch", "transformers", "pydantic", "pytest"} & set(modules)
    with EnvPool("faulty", {"log": str(log), "fault": "large"}, size=1) as pool:
        texts = [step.observation.text for step in play(pool, TASKS[0])[1:]]
    whole = [step.observation.text * 100_000 for step in undisturbed(TASKS[0])[1:]]
    assert texts == [f"{text[:100_000]}\n[{len(text) - 100_000} more characters are not shown]" for text in whole]


def test_memory_is_that_of_worker_and_descendants(log: Path):
    def resident(pid: int) -> int:
        return 1024 * int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True).stdout)

    with EnvPool("faulty", {"log": str(log), "child": True}, size=2) as pool:
        pool.wait(pool.submit_reset(1, TASKS[0]))
        measured = pool.stats().rss_bytes
        expected = resident(noted(log, "worker")[0]) + resident(noted(log, "child")[0])
    assert measured is not None and measured[0] == 0
    assert measured[1] == pytest.approx(expected, rel=0.1) and expected > 50_000_000


def test_a_worker_that_grows_is_replaced_between_episodes_only(
    log: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """60 MB more with every episode, 200 MB allowed: a worker begins its first episodes, and then another does."""
    monkeypatch.setattr("epo.environments._processes.MAX_AGE_SECONDS", 0.0)
    with EnvPool("faulty", {"log": str(log), "fault": "grow"}, size=1, worker_memory_mb=200) as pool:
        for task in TASKS[:9]:
            assert play(pool, task) == undisturbed(task)
            assert pool.restarts(0) == 0, "not a fault of the episode"
        stats = pool.stats()
        assert stats.rss_bytes is not None and stats.rss_bytes[0] < 300 * 2**20
    workers = noted(log, "worker")
    assert stats.recycled == len(workers) - 1 >= 2
    assert stats.restarts == {"died": 0, "hung": 0, "failed": 0} and stats.failures == 0
    wait_until_gone(workers)
    assert caplog.text.count("environment.worker_memory_mb") == stats.recycled
    assert f"(pid {workers[0]}) holds" in caplog.text and "more than the 200 MB" in caplog.text


def test_memory_counts_what_a_worker_started(log: Path, monkeypatch: pytest.MonkeyPatch):
    """The worker itself is below the limit; its child, as a JVM would, takes it above."""
    monkeypatch.setattr("epo.environments._processes.MAX_AGE_SECONDS", 0.0)
    with EnvPool("faulty", {"log": str(log), "child": True}, size=1, worker_memory_mb=60) as pool:
        for task in TASKS[:3]:
            pool.wait(pool.submit_reset(0, task))
        assert pool.stats().recycled == 2
    with EnvPool("faulty", {"log": str(log), "child": False}, size=1, worker_memory_mb=60) as pool:
        for task in TASKS[:3]:
            pool.wait(pool.submit_reset(0, task))
        assert pool.stats().recycled == 0


def test_temporary_files_of_killed_workers_are_removed(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with EnvPool("faulty", {"log": str(log), "fault": "litter"}, size=1) as pool:
        pool.wait(pool.submit_reset(0, TASKS[0]))
        os.kill(noted(log, "worker")[0], signal.SIGKILL)
        pool.wait(pool.submit_step(0, "push"))
        left = [Path(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("litter")]
        assert len(left) == 2 and all(folder.is_relative_to(tmp_path) for folder in left)
        assert [folder.exists() for folder in left] == [False, True]
    assert list(tmp_path.glob("epo-worker-*")) == []


def test_demonstrations_are_replayed_in_order(log: Path):
    progress: list[tuple[int, int]] = []
    with EnvPool("corridor", size=2) as pool:
        played = pool.demonstrate(TASKS[:10], on_done=lambda done, total: progress.append((done, total)))
    assert progress == [(done, 10) for done in range(1, 11)]
    for task, transitions in zip(TASKS, played, strict=False):
        assert isinstance(transitions, list)
        with SUITE.make_env() as env:
            observation = env.reset(task)
            for transition in transitions:
                assert transition.observation == observation
                assert transition.step == env.step(transition.action)
                observation = transition.step.observation
        assert transitions[-1].step.success
        assert len(transitions) == 5

    with EnvPool("faulty", {"log": str(log), "fault": "no expert"}, size=1) as pool:
        assert pool.demonstrate(TASKS[:2]) == [None, None]


def test_a_job_that_raises_leaves_no_call_behind():
    def broken(task: Task) -> Job[None]:
        yield Request("reset", task)
        raise ZeroDivisionError

    with EnvPool("corridor", size=2) as pool:
        with pytest.raises(ZeroDivisionError):
            pool.map(broken, TASKS[:4])
        assert pool.map(episode, TASKS[:2]) == [undisturbed(task) for task in TASKS[:2]]


class Weird(str):
    """A text that the parent process does not know the class of."""


@pytest.mark.parametrize(
    ("method", "value", "problem"),
    [
        ("reset", None, "reset returned a NoneType"),
        ("reset", Observation(text=7), "text is a int"),  # pyright: ignore
        ("reset", Observation(text="x", goal=b"x"), "goal is a bytes"),  # pyright: ignore
        ("reset", Observation(text="x", admissible_actions="xy"), "admissible_actions is a str"),  # pyright: ignore
        ("step", Observation(text="x"), "step returned a Observation, not a Step"),
        ("step", Step(observation=Observation(text="x"), reward="1", terminated=False), "reward is a str"),  # pyright: ignore
        ("step", Step(observation=Observation(text="x"), reward=0, terminated=1), "terminated is a int"),  # pyright: ignore
        ("step", Step(observation=None, reward=0, terminated=True), "step's observation returned a NoneType"),  # pyright: ignore
        ("demonstration", "open door", "demonstration is a str"),
        ("demonstration", ["open", 1], "demonstration is a int"),
    ],
)
def test_answers_of_the_wrong_kind_are_named(method: str, value: object, problem: str):
    with pytest.raises(TypeError, match=problem):
        checked(Request(method, ""), value)  # pyright: ignore


def test_answers_become_plain():
    answer = Step(
        observation=Observation(text=Weird("x"), admissible_actions=[Weird("a")]),  # pyright: ignore
        reward=np.float32(0.5),  # pyright: ignore
        terminated=np.bool_(True),  # pyright: ignore
        score=1,
    )
    step = checked(Request("step", ""), answer)
    assert step == Step(
        observation=Observation(text="x", admissible_actions=("a",)), reward=0.5, terminated=True, score=1.0
    )
    assert type(step.observation.text) is str and type(step.reward) is float and type(step.terminated) is bool
    assert checked(Request("demonstration", ""), None) is None


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (Observation(text="x" * 100_000, goal="y" * 100_000), None),
        (Observation(text="x", admissible_actions=("a" * 50_000,) * 2), None),
        (
            Observation(text="x", admissible_actions=("a" * 50_000, "b" * 50_001, "c")),
            Observation(text="x\n[2 more actions are not listed]", admissible_actions=("a" * 50_000,)),
        ),
        (
            Observation(text="x", admissible_actions=("",) * 500_000),
            Observation(text="x\n[490000 more actions are not listed]", admissible_actions=("",) * 10_000),
        ),
        (
            Observation(text="é" * 100_001, goal="y" * 1_000_000),
            Observation(
                text="é" * 100_000 + "\n[1 more characters are not shown]",
                goal="y" * 100_000 + "\n[900000 more characters are not shown]",
            ),
        ),
    ],
)
def test_what_is_too_long_to_read_is_cut_and_says_so(given: Observation, kept: Observation | None):
    assert checked(Request("reset", ""), given) == (kept or given)


class Unwilling:
    def __float__(self) -> float:
        raise RuntimeError("not now")


@pytest.mark.parametrize(
    "number",
    [10**400, Decimal("sNaN"), np.array([0.5, 0.5]), Unwilling()],
    ids=["too large", "signalling", "two numbers", "raises"],
)
@pytest.mark.parametrize("field", ["reward", "score"])
def test_a_number_that_has_no_floating_point_value_breaks_the_contract(field: str, number: Any):
    answer = replace(Step(observation=Observation(text="x"), reward=0.0, terminated=False), **{field: number})
    with pytest.raises(TypeError, match=f"{field} is a {type(number).__name__} without a floating-point value"):
        checked(Request("step", ""), answer)


def test_a_broken_contract_ends_the_episode_at_once_and_the_worker_goes_on(log: Path, caplog: pytest.LogCaptureFixture):
    options = {"log": str(log), "fault": "nonsense", "only": TASKS[0].id}
    with EnvPool("faulty", options, size=1) as pool:
        *before, failure = play(pool, TASKS[0])
        assert before == undisturbed(TASKS[0])[:2]
        assert isinstance(failure, EnvironmentFailure) and "broke its contract: step returned a object" in str(failure)
        assert play(pool, TASKS[1]) == undisturbed(TASKS[1])
        assert pool.stats().restarts == {"died": 0, "hung": 0, "failed": 0} and pool.stats().failures == 1
    assert len(noted(log, "worker")) == 1
    with EnvPool("faulty", {"log": str(log), "fault": "flood"}, size=1) as pool:
        (flooded,) = pool.demonstrate(TASKS[:1])
        assert "bytes; at most" in str(flooded)


@pytest.mark.parametrize(
    "data", [pickle.dumps(os.system), b"cos\nsystem\n(S'true'\ntR.", b"garbage", pickle.dumps(Path("x"))]
)
def test_workers_can_say_records_and_nothing_that_runs(data: bytes):
    worker = Worker.__new__(Worker)
    worker.socket, theirs = socket.socketpair()
    worker._buffer = bytearray()
    with worker.socket, theirs:
        theirs.sendall(struct.pack("!Q", len(data)) + data)
        with pytest.raises(Lost, match="is no answer"):
            worker.receive()
        theirs.sendall(struct.pack("!Q", 1 << 60))
        worker._buffer.clear()
        with pytest.raises(Lost, match="announced an answer"):
            worker.receive()
