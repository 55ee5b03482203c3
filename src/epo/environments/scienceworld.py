"""ScienceWorld: 30 kinds of elementary-school science experiments in a simulated house.

Wang et al., "ScienceWorld: Is your Agent Smarter than a 5th Grader?", EMNLP 2022 (arXiv 2203.07540). The simulator runs
in a Java virtual machine, one per environment: its state is global to the JVM.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from epo.environments._jvm import Jvm, java_version, require_java
from epo.environments._scienceworld_expert import shortened, with_shown_names
from epo.environments._scienceworld_tasks import NUM_VARIATIONS, variations
from epo.environments.base import TaskSuite, TextEnv
from epo.errors import EnvironmentFailure, UserError
from epo.types import Observation, Step, Task

Admissible = Literal["none", "objects", "valid"]

MAX_VALID_ACTIONS = 500
"""Longest list that `admissible="valid"` gives; longer ones (up to 2,800) are thinned evenly."""

_T = TypeVar("_T")

_SIMPLIFICATIONS = ("teleportAction", "openDoors", "openContainers", "selfWateringFlowerPots", "noElectricalAction")
_NOT_UNDERSTOOD = "No known action matches that input."
_AMBIGUITY_CANCELLED = "Unknown action.  Type 'help'"
_AMBIGUOUS = "Ambiguous request"
_CHOICE = re.compile(r"^(\d+):\t", re.MULTILINE)


class ScienceWorldSuite(TaskSuite):
    """The 7,207 variations of ScienceWorld's 30 task types.

    `train`, `iid` and `ood` are the simulator's train, dev and test splits. All three hold the same task types; `iid`
    and `ood` differ from `train` in the variation only (other objects, rooms and start positions). With `held_out`
    there is a fourth split of that name: the test variations of task types that nothing else holds.

    Args:
        tasks: task types to use, such as `["find-animal", "boil"]`; by default all 30, without those held out.
        held_out: task types of the split `held_out`, to be added to `evaluation.splits`.
        simplification: `""`, `"easy"` (the usual setting: doors open, teleport, self-watering pots, and no electrical
            actions where the task needs none), or a comma-separated list of the simulator's simplifications.
        admissible: what an observation lists: `"none"`; `"objects"`, the action templates and then the names of the
            visible objects; `"valid"`, the simulator's list of complete actions, at most `MAX_VALID_ACTIONS` of them.
        compact_demonstrations: shorten the expert's path where the shorter one still succeeds.
        max_variations: take only that many variations of each task type and split, evenly spaced.
        java: Java program, see `epo.environments._jvm.find_java`.
        jvm_memory_mb: heap limit of one JVM. 256 is ample: live data stays under 25 MB.
        jvm_options: further options for the JVM, after ours.
        read_timeout_seconds: how long one answer of the simulator may take before it counts as dead.

    Raises:
        UserError: an option is unknown or out of range.
    """

    name = "scienceworld"

    def __init__(
        self,
        *,
        tasks: list[str] | None = None,
        held_out: list[str] | None = None,
        simplification: str = "easy",
        admissible: Admissible = "none",
        compact_demonstrations: bool = True,
        max_variations: int | None = None,
        java: str | None = None,
        jvm_memory_mb: int = 256,
        jvm_options: Sequence[str] = (),
        read_timeout_seconds: float = 60.0,
    ) -> None:
        self.held_out = () if held_out is None else _checked_task_names("held_out", held_out)
        others = [name for name in NUM_VARIATIONS if name not in self.held_out]
        self.task_names = _checked_task_names("tasks", others if tasks is None else tasks)
        if both := [name for name in self.task_names if name in self.held_out]:
            raise UserError(
                f"held_out={list(self.held_out)!r}: {both[0]!r} is in tasks, too; leave it out of one of them"
            )
        if self.held_out:
            self.splits = (*self.splits, "held_out")
        _check_simplification(simplification, (*self.task_names, *self.held_out))
        if admissible not in get_args(Admissible):
            raise UserError(f"admissible={admissible!r}: choose one of {', '.join(get_args(Admissible))}")
        if max_variations is not None and max_variations < 1:
            raise UserError(f"max_variations={max_variations}: must be at least 1, or left out for all")
        if jvm_memory_mb < 64:
            raise UserError(f"jvm_memory_mb={jvm_memory_mb}: must be at least 64; 256 is ample")
        if read_timeout_seconds <= 0:
            raise UserError(f"read_timeout_seconds={read_timeout_seconds}: must be positive; 60 is the default")
        self.max_variations = max_variations
        self.worker_mb = jvm_memory_mb + 60  # measured: docs/reliability.md
        self._java = java
        self._env_options: dict[str, Any] = {
            "simplification": simplification,
            "admissible": admissible,
            "compact_demonstrations": compact_demonstrations,
            "java": java,
            "jvm_memory_mb": jvm_memory_mb,
            "jvm_options": tuple(jvm_options),
            "read_timeout_seconds": read_timeout_seconds,
        }

    def tasks(self, split: str) -> list[Task]:
        """All tasks of a split: task type by task type, variations ascending. Needs no Java."""
        if split not in self.splits:
            raise UserError(f"split={split!r}: scienceworld has {', '.join(self.splits)}")
        names, of = (self.held_out, "ood") if split == "held_out" else (self.task_names, split)
        return [
            Task(suite=self.name, id=f"{name}/{variation}", split=split, goal=name)
            for name in names
            for variation in _evenly_spaced(variations(name, of), self.max_variations)
        ]

    def make_env(self) -> ScienceWorldEnv:
        return ScienceWorldEnv(**self._env_options)

    def prepare(self) -> None:
        self.provenance()

    def provenance(self) -> dict[str, Any]:
        """Version and JAR hash of the simulator, and the Java it runs on."""
        jar = _simulator_jar()
        return {
            "scienceworld": importlib.metadata.version("scienceworld"),
            "jar_sha256": hashlib.sha256(jar.read_bytes()).hexdigest(),
            "java": java_version(require_java(self._java, needed_by="ScienceWorld")),
        }


class ScienceWorldEnv(TextEnv):
    """One simulator in one JVM, started at the first `reset` and kept until `close`. Options: `ScienceWorldSuite`.

    Success is a score of 100 with every goal completed. The score is the simulator's, divided by 100; the reward is 1
    at success and 0 otherwise. Focusing on a wrong object fails the task for good: score 0, terminated. The simulator
    has no step limit here. `reset task`, which would undo a failure, is not understood.

    When the JVM dies, hangs or reports an internal error, `EnvironmentFailure` is raised and the next `reset` starts a
    new one.
    """

    def __init__(
        self,
        *,
        simplification: str = "easy",
        admissible: Admissible = "none",
        compact_demonstrations: bool = True,
        java: str | None = None,
        jvm_memory_mb: int = 256,
        jvm_options: Sequence[str] = (),
        read_timeout_seconds: float = 60.0,
    ) -> None:
        self._jar = _simulator_jar()
        self._simplification = simplification
        self._admissible: Admissible = admissible
        self._compact_demonstrations = compact_demonstrations
        self._java = java
        self._jvm_options = (
            f"-Xmx{jvm_memory_mb}m",
            "-XX:+UseSerialGC",
            # Caught in some thread, an OutOfMemoryError leaves a simulator that answers nonsense, or not at all.
            "-XX:+ExitOnOutOfMemoryError",
            "-XX:-UsePerfData",  # a file in /tmp, which outlives a killed JVM
            # Identity hashes are memory addresses otherwise, and they order the simulator's sets: listings, and whom a
            # bee visits, would differ from run to run.
            "-XX:+UnlockExperimentalVMOptions",
            "-XX:hashCode=2",
            # The parser lower-cases by locale.
            "-Duser.language=en",
            "-Duser.country=US",
            *jvm_options,
        )
        self._read_timeout = read_timeout_seconds
        self._jvm: Jvm | None = None
        self._simulator: Any = None
        self._agent_interface: Any = None
        self._over = True

    @property
    def jvm_pid(self) -> int | None:
        """Process id of the JVM, or None while there is none."""
        return None if self._jvm is None else self._jvm.pid

    def reset(self, task: Task) -> Observation:
        name, variation = _parse_id(task)
        with self._ending_jvm_on_failure():
            self._load(name, variation)
            text: str = self._simulator.step("look around")
            self._agent_interface = self._simulator.agentInterface().get()
            self._check_error_state()
            self._over = False
            goal = " ".join(str(self._simulator.getTaskDescription()).split())
            return Observation(text=text, admissible_actions=self._admissible_actions(text), goal=goal)

    def step(self, action: str) -> Step:
        if self._agent_interface is None or self._over:
            raise RuntimeError("step() needs an episode: call reset() first, also after an EnvironmentFailure")
        action = _sanitised(action)
        with self._ending_jvm_on_failure():
            text: str = self._simulator.step("" if _is_reset(action) else action)
            self._check_error_state()
            score: float = self._simulator.getScore()
            success = score >= 1.0 and bool(self._simulator.getCompleted())
            self._over = success or score < 0
            return Step(
                observation=Observation(text=text, admissible_actions=self._admissible_actions(text)),
                reward=float(success),
                terminated=self._over,
                success=success,
                score=max(0.0, score),
                understood=not text.startswith((_NOT_UNDERSTOOD, _AMBIGUITY_CANCELLED)),
            )

    def demonstration(self, task: Task) -> list[str] | None:
        """The simulator's gold path, cut at success and proven by replay; None where it does not reach success.

        Takes as long as two to four episodes; the two `mendelian-genetics` tasks take half a minute.
        """
        name, variation = _parse_id(task)
        with self._ending_jvm_on_failure():
            self._load(name, variation, generate_gold_path=True)
            assert self._jvm is not None
            gold = self._jvm.strings(self._simulator.getGoldActionSequence())
        played = self._replay(task, gold)
        if played is None:
            return None
        actions, replies = played
        for proposal in self._shorter(actions, replies):
            if shorter := self._replay(task, proposal):
                return shorter[0]
        return actions

    def close(self) -> None:
        self._agent_interface = self._simulator = None
        if self._jvm is not None:
            self._jvm.close()
            self._jvm = None

    def _load(self, name: str, variation: int, *, generate_gold_path: bool = False) -> None:
        if self._jvm is None:
            self._jvm = Jvm(
                java=require_java(self._java, needed_by="ScienceWorld"),
                classpath=str(self._jar),
                options=self._jvm_options,
                # The simulator reads a table of object types from here, and writes one where it finds none.
                cwd=self._jar.parent,
                read_timeout=self._read_timeout,
            )
            self._simulator = self._jvm.classes.scienceworld.runtime.pythonapi.PythonInterface()
        error = self._simulator.load(name, variation, self._simplification, generate_gold_path)
        if error:
            raise EnvironmentFailure(f"ScienceWorld cannot load {name}/{variation}: {error}")

    @contextlib.contextmanager
    def _ending_jvm_on_failure(self) -> Iterator[None]:
        """No half-read answer and no broken simulator survives a failure of any kind."""
        from py4j.protocol import Py4JError

        try:
            yield
        except UserError:
            raise
        except EnvironmentFailure as error:
            said = "" if self._jvm is None else self._jvm.last_words()
            self.close()
            raise EnvironmentFailure(f"{error}{said and f' (it said: {said})'}") from error
        except Py4JError as error:
            self.close()
            raise EnvironmentFailure(f"ScienceWorld's JVM reported: {error}") from error
        except BaseException:
            self.close()
            raise

    def _check_error_state(self) -> None:
        """The simulator catches its own exceptions and then scores -1, as if the agent had failed."""
        if self._agent_interface.isInErrorState():
            raise EnvironmentFailure(f"ScienceWorld failed inside: {self._agent_interface.getErrorStateMessage()}")

    def _admissible_actions(self, text: str) -> tuple[str, ...] | None:
        if self._admissible == "none":
            return None
        if text.startswith(_AMBIGUOUS):
            return tuple(_CHOICE.findall(text))
        assert self._jvm is not None
        if self._admissible == "objects":
            templates = self._jvm.strings(self._simulator.getPossibleActions())
            objects = self._jvm.strings(self._simulator.getPossibleObjects())
            listed = [*templates, *objects]
        else:
            listed = self._jvm.strings(self._simulator.getValidActionObjectCombinations())
        return tuple(_evenly_spaced([action for action in listed if not _is_reset(action)], MAX_VALID_ACTIONS))

    def _shorter(self, actions: list[str], replies: list[str]) -> list[list[str]]:
        """Proposals to replay, best first."""
        if not self._compact_demonstrations:
            return []
        proposals = [with_shown_names(actions, replies), actions]
        if "teleportAction" in self._simplification or self._simplification == "easy":
            proposals = [shortened(proposal) for proposal in proposals]
        return [proposal for proposal in proposals if proposal != actions]

    def _replay(self, task: Task, actions: Sequence[str]) -> tuple[list[str], list[str]] | None:
        """Plays `actions`. Returns them and the observations after them up to success, or None without success."""
        self.reset(task)
        replies: list[str] = []
        for action in actions:
            step = self.step(action)
            replies.append(step.observation.text)
            if step.success:
                return list(actions[: len(replies)]), replies
            if step.terminated:
                break
        return None


def _simulator_jar() -> Path:
    """Where the installed simulator is, found without importing it.

    Raises:
        UserError: scienceworld is not installed.
    """
    package = importlib.util.find_spec("scienceworld")
    if package is None or package.origin is None:
        raise UserError("the scienceworld suite needs its simulator: pip install -e '.[scienceworld]'")
    return Path(package.origin).parent / "scienceworld.jar"


def _checked_task_names(option: str, names: list[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not names:
        raise UserError(f"{option}={names!r}: must be a list with at least one task name, such as [find-animal]")
    for name in names:
        if name not in NUM_VARIATIONS:
            raise UserError(f"{option}: no ScienceWorld task is called {name!r}{_hint(name, NUM_VARIATIONS)}")
    if len(set(names)) < len(names):
        raise UserError(f"{option}={names!r}: a name stands there twice")
    return tuple(names)


def _check_simplification(simplification: str, task_names: Sequence[str]) -> None:
    if simplification in ("", "easy"):
        return
    for part in simplification.split(","):
        if part not in _SIMPLIFICATIONS:
            raise UserError(
                f"simplification={simplification!r}: {part!r} is unknown{_hint(part, _SIMPLIFICATIONS)}. "
                f'Use "", "easy", or a comma-separated list of {", ".join(_SIMPLIFICATIONS)}'
            )
    electrical = [name for name in task_names if "power-component" in name or "conductivity" in name]
    if "noElectricalAction" in simplification and electrical:
        raise UserError(
            f"simplification={simplification!r}: task {electrical[0]!r} cannot be done with noElectricalAction; "
            f"leave out one of the two"
        )


def _hint(name: str, known: Sequence[str] | dict[str, int]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"; did you mean {near[0]!r}?" if near else ""


def _parse_id(task: Task) -> tuple[str, int]:
    name, _, number = task.id.rpartition("/")
    if name not in NUM_VARIATIONS or not number.isdecimal() or int(number) >= NUM_VARIATIONS[name]:
        raise UserError(f"task id {task.id!r}: must be a ScienceWorld task name and variation, such as find-animal/17")
    return name, int(number)


def _evenly_spaced(items: Sequence[_T], limit: int | None) -> Sequence[_T]:
    if limit is None or len(items) <= limit:
        return items
    return [items[index * len(items) // limit] for index in range(limit)]


def _sanitised(action: str) -> str:
    """What the simulator can be sent: valid Unicode, control characters as blanks (its parser skips them unevenly)."""
    action = action.encode("utf-8", errors="replace").decode("utf-8")
    return "".join(" " if character < " " else character for character in action).strip()


def _is_reset(action: str) -> bool:
    """Whether the simulator's parser would read `reset task`: it ignores case, spacing and articles."""
    return [word for word in action.lower().split() if word not in ("a", "an", "the")] == ["reset", "task"]
