"""`epo env check`: does a suite keep the contract of `epo.environments.base`?

Every check is a function from an `Examination` to one line on what was seen. It raises `Misconduct` with one line on
what is wrong, or `NotApplicable` where there is nothing to check.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any, cast

from epo.authoring.probe import Misconduct, Probe, Reply
from epo.environments.base import TaskSuite
from epo.environments.registry import load_suite, resolve_suite
from epo.errors import UserError
from epo.types import Observation, Step, Task

ODD_ACTIONS = {
    "empty": "",
    "blank": " \t\r\n",
    "huge": "open the door " * 10_000,
    "control characters": "look\x00\x07\x1b[2J\x7f",
    "lone surrogates": "take \ud800\udfff",
    "other scripts": "öffne die Tür 打开门 🚪",
    "many lines": "look\nlook\n" * 50,
    "format strings": "%s%n {0} {x} ${y} \\N",
    "markup": "<action>look</action>",
}
_LEAK_BYTES_PER_RESET = 100_000
_LEAK_BYTES_PER_RESET_DESCENDANTS = 2_000_000  # a virtual machine fills its heap before it collects
_LEAK_DESCRIPTORS_PER_RESET = 0.1

_LIST_TASKS = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from epo.authoring.checks import fingerprint
from epo.environments.registry import load_suite
name, target, options = json.loads(sys.argv[2])
print("\\n" + fingerprint(load_suite(name, target, options)))
"""


class NotApplicable(Exception):
    """The suite does not offer what the check is about, or this machine cannot measure it."""


class Verdict(StrEnum):
    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The outcome of one check."""

    check: str
    verdict: Verdict
    detail: str

    def as_dict(self) -> dict[str, str]:
        return {key: str(value) for key, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Thoroughness:
    """How much of a suite is looked at, and what is too slow."""

    tasks: int = 3
    """Tasks of each split, evenly spaced."""
    turns: int = 15
    resets: int = 200
    """Resets, of four turns each, over which leaks are measured."""
    seconds: float = 120.0
    """Deadline of one call."""
    slowest_ms: float = 1000.0
    """Median of a step that is too slow; a reset may take ten times as long."""


@dataclass(kw_only=True)
class Examination:
    """A suite under examination, with what earlier checks have found out."""

    name: str
    options: Mapping[str, Any]
    suite: TaskSuite
    probe: Probe
    thoroughness: Thoroughness
    reset_seconds: list[float] = field(default_factory=list[float])
    step_seconds: list[float] = field(default_factory=list[float])

    def chosen(self) -> list[Task]:
        """Some tasks of every split, evenly spaced."""
        chosen: list[Task] = []
        for split in self.suite.splits:
            tasks = self.suite.tasks(split)
            wanted = min(len(tasks), self.thoroughness.tasks)
            chosen += [tasks[index * len(tasks) // wanted] for index in range(wanted)]
        return chosen

    def reset(self, task: Task, probe: Probe | None = None) -> Observation:
        """Reset, measured and checked."""
        reply = (probe or self.probe).call("reset", task)
        if probe is None:
            self.reset_seconds.append(reply.seconds)
        observation = _value(reply, f"reset to {task.id!r}")
        _check_observation(observation, f"reset to {task.id!r}")
        return observation

    def step(self, action: str, probe: Probe | None = None) -> Step:
        """Step, measured and checked."""
        reply = (probe or self.probe).call("step", action)
        if probe is None:
            self.step_seconds.append(reply.seconds)
        step = _value(reply, f"step {_short(action)}")
        _check_step(step, f"step {_short(action)}")
        return step

    def play(self, task: Task, probe: Probe | None = None) -> tuple[list[str], list[Observation | Step]]:
        """An episode of random admissible actions, the same for the same task: what was done, and what was answered."""
        rng = random.Random(f"{task.id}/{task.seed}")
        observation = self.reset(task, probe)
        actions: list[str] = []
        answers: list[Observation | Step] = [observation]
        for _ in range(self.thoroughness.turns):
            action = rng.choice(observation.admissible_actions or ("look", "wait", "no such action"))
            step = self.step(action, probe)
            actions.append(action)
            answers.append(step)
            if step.terminated or step.truncated:
                break
            observation = step.observation
        return actions, answers


def examine_suite(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    thoroughness: Thoroughness | None = None,
    on_done: Callable[[Finding], None] | None = None,
) -> list[Finding]:
    """Run every check on a suite. What the suite does wrong is a finding, never an exception.

    Args:
        on_done: called with every finding as it is made.

    Raises:
        UserError: unknown suite or option, or something that the suite needs is missing.
    """
    options = dict(options or {})
    thoroughness = thoroughness or Thoroughness()
    findings: list[Finding] = []

    def note(check: str, verdict: Verdict, detail: str) -> None:
        findings.append(Finding(check=check, verdict=verdict, detail=detail))
        if on_done is not None:
            on_done(findings[-1])

    target = resolve_suite(name)
    try:
        suite = load_suite(name, target, options)
        suite.prepare()
    except UserError:
        raise
    except Exception as error:
        note("suite", Verdict.FAILED, f"cannot be built: {type(error).__name__}: {error}")
        return findings
    with Probe(name, options, seconds=thoroughness.seconds) as probe:
        examination = Examination(name=name, options=options, suite=suite, probe=probe, thoroughness=thoroughness)
        for check, function in CHECKS.items():
            try:
                note(check, Verdict.OK, function(examination))
            except NotApplicable as reason:
                note(check, Verdict.SKIPPED, str(reason))
            except Misconduct as misconduct:
                note(check, Verdict.FAILED, str(misconduct))
            except Exception as error:
                note(check, Verdict.FAILED, f"{type(error).__name__}: {error}")
            if check == "splits" and findings[-1].verdict is Verdict.FAILED:
                break  # without tasks there is nothing to play
    return findings


def fingerprint(suite: TaskSuite) -> str:
    """A digest of all tasks of all splits, in order."""
    tasks = [[asdict(task) for task in suite.tasks(split)] for split in suite.splits]
    return hashlib.sha256(json.dumps(tasks).encode()).hexdigest()


def check_splits(examination: Examination) -> str:
    """`train` exists; ids are unique and no two splits share one; tasks say where they belong."""
    suite = examination.suite
    _require("train" in suite.splits, f"there is no split 'train', only {', '.join(suite.splits)}")
    seen: dict[str, str] = {}
    sizes: list[str] = []
    for split in suite.splits:
        tasks = suite.tasks(split)
        _require(len(tasks) > 0, f"split {split!r} is empty")
        _require(list(tasks) == list(suite.tasks(split)), f"split {split!r} is listed differently the second time")
        for task in tasks:
            _require(isinstance(task, Task), f"split {split!r} lists a {type(task).__name__}, not a Task")
            _require(task.suite == suite.name, f"task {task.id!r} says suite {task.suite!r}, not {suite.name!r}")
            _require(task.split == split, f"task {task.id!r} of split {split!r} says split {task.split!r}")
            key = f"{task.id}\n{task.seed}"
            _require(key not in seen, f"task {task.id!r} (seed {task.seed}) is in {seen.get(key)!r} and in {split!r}")
            seen[key] = split
        sizes.append(f"{split} {len(tasks)}")
    try:
        suite.tasks("no such split")
    except UserError:
        pass
    else:
        raise Misconduct("an unknown split is not refused with a UserError")
    missing = [split for split in ("iid", "ood") if split not in suite.splits]
    return ", ".join(sizes) + (f"; no {' and no '.join(missing)}: name others in evaluation.splits" if missing else "")


def check_plain_data(examination: Examination) -> str:
    """Options are plain data; tasks survive pickling; another process lists the same tasks."""
    for task in examination.chosen():
        _require(pickle.loads(pickle.dumps(task)) == task, f"task {task.id!r} changes when it is pickled")
        for name, value in asdict(task).items():
            kind = int if name == "seed" else str
            _require(type(value) is kind, f"task {task.id!r}: {name} is a {type(value).__name__}, not {kind.__name__}")
    arguments = [examination.name, resolve_suite(examination.name), dict(examination.options)]
    done = subprocess.run(
        [sys.executable, "-c", _LIST_TASKS, json.dumps([str(path) for path in sys.path]), json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=examination.thoroughness.seconds,
        env={**os.environ, "PYTHONHASHSEED": "4711"},  # sets are iterated in another order
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Misconduct(f"another process cannot build the suite: {words[-1]}")
    same = done.stdout.splitlines()[-1] == fingerprint(examination.suite)
    _require(same, "another process, with another hash seed, lists other tasks")
    return "another process builds the suite and lists the same tasks"


def check_types(examination: Examination) -> str:
    """Observations and steps hold what `epo.types` says, the first observation the goal."""
    turns = 0
    for task in examination.chosen():
        _, answers = examination.play(task)
        first = cast(Observation, answers[0])
        _require(bool(first.text or first.goal), f"reset to {task.id!r}: neither text nor goal")
        turns += len(answers) - 1
        for step in cast("list[Step]", answers[1:]):
            _require(step.observation.goal is None, f"task {task.id!r}: a step repeats the goal; only a reset gives it")
    return f"{len(examination.chosen())} episodes, {turns} turns"


def check_determinism(examination: Examination) -> str:
    """The same task and actions give the same answers again, and in another process."""
    episodes = [(task, examination.play(task)) for task in examination.chosen()]
    for task, episode in reversed(episodes):
        _same(episode, examination.play(task), f"task {task.id!r}, played again")
    with Probe(examination.name, examination.options, seconds=examination.thoroughness.seconds) as other:
        for task, episode in episodes:
            _same(episode, examination.play(task, other), f"task {task.id!r}, in another process")
    return f"{len(episodes)} episodes equal when played again, and in another process"


def check_reset(examination: Examination) -> str:
    """A reset in the middle of an episode starts anew."""
    tasks = examination.chosen()
    for task in tasks:
        first = examination.reset(task)
        examination.step((first.admissible_actions or ("look",))[0])
        _same_answer(first, examination.reset(task), f"task {task.id!r}, reset after one step")
        _same_answer(first, examination.reset(task), f"task {task.id!r}, reset twice")
    return f"{len(tasks)} tasks start alike from wherever the environment is"


def check_odd_actions(examination: Examination) -> str:
    """Any string is an action: never an exception."""
    task, answered = examination.chosen()[0], 0
    for kind, action in ODD_ACTIONS.items():
        examination.reset(task)
        try:
            answered += not examination.step(action).understood
        except Misconduct as misconduct:
            raise Misconduct(f"{kind}: {misconduct}") from None
    return f"{len(ODD_ACTIONS)} answered, {answered} of them as not understood"


def check_after_the_end(examination: Examination) -> str:
    """Without an episode a step raises RuntimeError, and a reset is all it takes to go on."""
    for task in examination.chosen():
        demonstration = _value(examination.probe.call("demonstration", task), f"demonstration of {task.id!r}")
        examination.reset(task)
        actions = demonstration if demonstration is not None else examination.play(task)[0]
        if demonstration is None:
            examination.reset(task)
        for action in actions:
            step = examination.step(action)
            if step.terminated or step.truncated:
                break
        else:
            continue
        reply = examination.probe.call("step", actions[0])
        if reply.error is None or not reply.error.startswith("RuntimeError"):
            what = "is answered" if reply.error is None else f"raises {reply.error}"
            raise Misconduct(f"task {task.id!r}: a step after the end {what}; it must raise RuntimeError")
        examination.reset(task)
        return f"RuntimeError after the end of {task.id!r}; a reset goes on"
    raise NotApplicable(f"no episode ended within {examination.thoroughness.turns} turns")


def check_demonstrations(examination: Examination) -> str:
    """Where an expert is offered, its actions reach full success, with the last of them."""
    offered = 0
    tasks = examination.chosen()
    for task in tasks:
        actions = _value(examination.probe.call("demonstration", task), f"demonstration of {task.id!r}")
        if actions is None:
            continue
        what = f"demonstration of {task.id!r}"
        _require(isinstance(actions, list) and all(type(a) is str for a in actions), f"{what}: not a list of str")
        _require(bool(actions), f"{what}: no actions")
        offered += 1
        examination.reset(task)
        steps: list[Step] = []
        for action in actions:
            steps.append(examination.step(action))
            if steps[-1].terminated or steps[-1].truncated:
                break
        _require(steps[-1].success, f"{what}: no success after {len(steps)} of {len(actions)} actions")
        _require(len(steps) == len(actions), f"{what}: {len(actions) - len(steps)} actions after the end")
    if not offered:
        raise NotApplicable("no expert")
    return f"{offered} of {len(tasks)} tasks have one, and it succeeds"


def check_leaks(examination: Examination) -> str:
    """Memory, processes and file descriptors stop growing."""
    probe, resets = examination.probe, examination.thoroughness.resets
    tasks = examination.chosen()
    middle = None
    for number in range(resets):
        if number == resets // 2:
            middle = probe.usage()  # by then what is loaded lazily is there
        observation = examination.reset(tasks[number % len(tasks)])
        for turn in range(4):
            actions = observation.admissible_actions or ("look",)
            step = examination.step(actions[turn % len(actions)])
            if step.terminated or step.truncated:
                break
            observation = step.observation
    end = probe.usage()
    if middle is None or end is None:
        raise NotApplicable("needs /proc and at least two resets")
    over = resets - resets // 2
    own, descendants = end.own_bytes - middle.own_bytes, end.descendants_bytes - middle.descendants_bytes
    descriptors, processes = end.descriptors - middle.descriptors, end.processes - middle.processes
    seen = (
        f"over the last {over} of {resets} resets: memory {own / 2**20:+.1f} MB (descendants"
        f" {descendants / 2**20:+.1f} MB), file descriptors {descriptors:+d}, processes {processes:+d}"
    )
    # Allocators take memory in lumps, so that a few megabytes say nothing.
    _require(own <= 4 * 2**20 + _LEAK_BYTES_PER_RESET * over, f"memory grows: {seen}")
    _require(
        descendants <= 64 * 2**20 + _LEAK_BYTES_PER_RESET_DESCENDANTS * over, f"memory of its processes grows: {seen}"
    )
    _require(descriptors <= _LEAK_DESCRIPTORS_PER_RESET * over, f"file descriptors are not closed: {seen}")
    _require(processes <= _LEAK_DESCRIPTORS_PER_RESET * over, f"processes are not ended: {seen}")
    return seen


def check_speed(examination: Examination) -> str:
    """Milliseconds of a reset and of a step, of all that were made, through the worker's socket."""
    if not examination.reset_seconds or not examination.step_seconds:
        raise NotApplicable("nothing could be played")
    reset, step = (1000 * median(times) for times in (examination.reset_seconds, examination.step_seconds))
    slowest = 1000 * max(examination.reset_seconds + examination.step_seconds)
    seen = f"reset {reset:.2f} ms, step {step:.2f} ms (medians); slowest call {slowest:.0f} ms"
    limit = examination.thoroughness.slowest_ms
    _require(
        step <= limit and reset <= 10 * limit, f"too slow for {limit:g} ms a step, {10 * limit:g} ms a reset: {seen}"
    )
    return seen


CHECKS: dict[str, Callable[[Examination], str]] = {
    "splits": check_splits,
    "plain data": check_plain_data,
    "types": check_types,
    "determinism": check_determinism,
    "reset": check_reset,
    "odd actions": check_odd_actions,
    "after the end": check_after_the_end,
    "demonstrations": check_demonstrations,
    "leaks": check_leaks,
    "speed": check_speed,
}


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Misconduct(otherwise)


def _value(reply: Reply, what: str) -> Any:
    if reply.error is not None:
        raise Misconduct(f"{what}: {reply.error}")
    return reply.value


def _short(action: str) -> str:
    return repr(action if len(action) <= 40 else action[:40] + "...")


def _check_observation(observation: Any, what: str) -> None:
    _require(isinstance(observation, Observation), f"{what}: a {type(observation).__name__}, not an Observation")
    _check_text(observation.text, f"{what}: text")
    if observation.goal is not None:
        _check_text(observation.goal, f"{what}: goal")
    actions = observation.admissible_actions
    if actions is not None:
        for action in actions:
            _check_text(action, f"{what}: an admissible action")


def _check_text(text: Any, what: str) -> None:
    _require(type(text) is str, f"{what} is a {type(text).__name__}, not a str")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Misconduct(f"{what} holds lone surrogates, which cannot be written as UTF-8") from None


def _check_step(step: Any, what: str) -> None:
    _require(isinstance(step, Step), f"{what}: a {type(step).__name__}, not a Step")
    _check_observation(step.observation, what)
    for name in ("terminated", "truncated", "success", "understood"):
        value = getattr(step, name)
        _require(type(value) is bool, f"{what}: {name} is a {type(value).__name__}, not a bool")
    for name in ("reward", "score"):
        value = getattr(step, name)
        is_number = type(value) in (int, float) and math.isfinite(value)
        _require(is_number, f"{what}: {name} is {value!r} ({type(value).__name__}), not a finite float")
    _require(0 <= step.score <= 1, f"{what}: score is {step.score}, not from 0 to 1")
    _require(step.terminated or not step.success, f"{what}: success without terminated")
    _require(step.score == 1 or not step.success, f"{what}: success with a score of {step.score}, not 1")


Episode = tuple[list[str], Sequence[Observation | Step]]


def _same(first: Episode, second: Episode, what: str) -> None:
    for turn, (one, other) in enumerate(zip(first[1], second[1], strict=False)):
        _same_answer(one, other, f"{what}, turn {turn}")
    _require(first == second, f"{what}: other actions or another number of turns")


def _same_answer(one: Observation | Step, other: Observation | Step, what: str) -> None:
    if one == other:
        return
    ours, theirs = asdict(one), asdict(other)
    ours, theirs = ours | ours.pop("observation", {}), theirs | theirs.pop("observation", {})
    name = next(name for name in ours if ours[name] != theirs[name])
    raise Misconduct(f"{what}: {name} is {_short(str(theirs[name]))}, not {_short(str(ours[name]))}")
