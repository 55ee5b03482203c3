"""A corridor that fails on demand, for the tests of the pool. Imported by name in worker processes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from epo.environments.base import TaskSuite, TextEnv
from epo.environments.corridor import CorridorSuite
from epo.errors import EnvironmentFailure, UserError
from epo.types import Observation, Step, Task


class StrangeError(Exception):
    """Known to workers only: its constructor could not be unpickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class FaultyEnv(TextEnv):
    def __init__(self, suite: FaultySuite) -> None:
        self.suite, self.inner = suite, CorridorSuite(**suite.corridor).make_env()
        self.task_id, self.calls = "", 0
        self.held: list[bytes] = []
        self.child: subprocess.Popen[bytes] | None = None
        if suite.child:
            code = "import time; held = b'x' * 50_000_000; print(1, flush=True); time.sleep(600)"
            # In a process group of its own, as a simulator that must not hear Ctrl-C.
            self.child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, process_group=0)
            self.child.stdout.readline()
            self.note("child", self.child.pid)
        self.note("worker", os.getpid())

    def note(self, *words: object) -> None:
        with self.suite.log.open("a") as log:
            log.write(" ".join(map(str, words)) + "\n")

    def reset(self, task: Task) -> Observation:
        self.task_id, self.calls = task.id, 0
        if self.suite.fault == "grow":
            self.held.append(b"x" * 60_000_000)
        if self.suite.fault == "litter":
            folder = Path(tempfile.mkdtemp())
            (folder / "half-written").write_bytes(b"x")
            self.note("litter", folder)
        self.misbehave()
        return self.inner.reset(task)

    def step(self, action: str) -> Step:
        self.calls += 1
        self.misbehave()
        if self.suite.fault == "nonsense" and self.suite.only == self.task_id and self.calls == self.suite.at:
            return object()  # pyright: ignore
        step = self.inner.step(action)
        text = step.observation.text
        if self.suite.fault == "nondeterministic":
            text += f" Process {os.getpid()}."
        if self.suite.fault == "large":
            text *= 100_000
        if self.suite.fault == "modules":
            text = " ".join(sys.modules)
        return replace(step, observation=replace(step.observation, text=text))

    def demonstration(self, task: Task) -> list[str] | None:
        if self.suite.fault == "flood":
            return ["x" * (1 << 24)]
        return None if self.suite.fault == "no expert" else self.inner.demonstration(task)

    def close(self) -> None:
        self.note("closed", os.getpid())

    def misbehave(self) -> None:
        suite = self.suite
        if suite.fault == "noise":
            sys.stdout.write("noise of a simulator\n")
            sys.stdout.flush()
            os.system("echo noise of a child; echo noise of a child >&2")
        if self.calls != suite.at or suite.only not in ("", self.task_id):
            return
        if suite.log.read_text().count("fault") >= suite.times:
            return
        self.note("fault", suite.fault)
        match suite.fault:
            case "exit":
                os._exit(3)
            case "crash":
                ctypes.string_at(0)
            case "hang":
                time.sleep(600)
            case "raise":
                raise StrangeError("bolts", "nuts")
            case "environment failure":
                raise EnvironmentFailure("the simulator died")
            case "user error":
                raise UserError("task: no such task, choose another")


class FaultySuite(TaskSuite):
    """Does `fault` at the `at`-th step (0: the reset) of episodes of task `only`, `times` times in all."""

    name = "faulty"

    def __init__(
        self,
        *,
        log: Path,
        fault: str = "",
        at: int = 2,
        times: int = 1,
        only: str = "",
        child: bool = False,
        corridor: dict[str, object] | None = None,
    ) -> None:
        self.log, self.fault, self.at, self.times, self.only, self.child = Path(log), fault, at, times, only, child
        self.corridor = corridor or {}
        self.log.touch()

    def tasks(self, split: str) -> Sequence[Task]:
        return CorridorSuite(**self.corridor).tasks(split)

    def make_env(self) -> FaultyEnv:
        return FaultyEnv(self)


def not_a_suite() -> None:
    """For the registry's tests."""
