"""Expert episodes: collected once from the environments, kept on disk, rendered as the agent would have lived them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from epo.agent.chat import ChatFormat
from epo.agent.parsing import render_response
from epo.config import AgentConfig, Config
from epo.environments.base import TaskSuite
from epo.environments.pool import EnvPool, Transition
from epo.errors import EnvironmentFailure, UserError
from epo.files import cache_dir, exclusive, write_atomically
from epo.rollout import ContextFactory
from epo.tasks import balanced_order
from epo.types import Observation, StopReason, Task, Trajectory, Turn


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """An expert's episode, ending in full success."""

    task: Task
    observations: list[Observation]
    """What was read before each action."""
    actions: list[str]


def collect_demonstrations(
    config: Config, suite: TaskSuite, pool: EnvPool, *, on_done: Callable[[int, int], None] | None = None
) -> list[Demonstration]:
    """`imitation.demonstrations` successful expert episodes on training tasks, from the cache or from the environments.

    Raises:
        UserError: the suite has no expert, or no expert episode succeeded.
    """
    tasks = balanced_order(suite.tasks("train"), seed=config.seed, balance=config.rollout.balance)
    tasks = tasks[: config.imitation.demonstrations]
    path = cache_dir() / "demonstrations" / f"{_digest(config, suite, tasks)}.json"
    if not path.is_file():
        with exclusive(path):  # the runs of a sweep share demonstrations
            if not path.is_file():
                _play(path, suite, tasks, pool, on_done=on_done)
    return _read(path)


def _play(
    path: Path, suite: TaskSuite, tasks: Sequence[Task], pool: EnvPool, *, on_done: Callable[[int, int], None] | None
) -> None:
    """Have the environments' experts play `tasks`, and leave what succeeded in the file `path`."""
    demonstrations: list[Demonstration] = []
    for task, played in zip(tasks, pool.demonstrate(tasks, on_done=on_done), strict=True):
        if isinstance(played, EnvironmentFailure):
            # A set that lacks what this machine happened to lose must not be kept, nor silently be another warm start.
            raise UserError(
                f"the expert episode of task {task.id!r} was lost ({played}): run it again, with a larger "
                "environment.timeout_seconds or fewer environment.workers if the machine is busy"
            )
        if played and played[-1].step.success:
            demonstrations.append(_demonstration(task, played))
    if not demonstrations:
        raise UserError(
            f"suite {suite.name!r} has no expert to imitate that succeeds: set imitation.demonstrations=0 and give a "
            "model directory as model.path"
        )
    write_atomically(path, json.dumps([asdict(d) for d in demonstrations]))


def as_trajectory(
    demonstration: Demonstration, chat: ChatFormat, config: AgentConfig, *, max_context: int
) -> Trajectory:
    """The episode as tokens, had the policy written the expert's responses."""
    context = ContextFactory(chat, config, max_context=max_context)()
    trajectory = Trajectory(task=demonstration.task, stop_reason=StopReason.SUCCESS, success=True, score=1.0)
    prompt_ids = context.open(demonstration.observations[0])
    following = [*demonstration.observations[1:], None]
    for observation, action, after in zip(demonstration.observations, demonstration.actions, following, strict=True):
        text = render_response(action, response_format=config.format)
        response_ids = chat.response_ids(text)
        unknown = np.zeros(len(response_ids), dtype=np.float32)
        trajectory.turns.append(
            Turn(
                prompt_ids=np.array(prompt_ids, dtype=np.int64),
                response_ids=np.array(response_ids, dtype=np.int64),
                logprobs=unknown,
                entropy=unknown,
                observation=observation.text,
                response=text,
                action=action,
                is_valid=True,
            )
        )
        if after is not None:
            prompt_ids = context.advance(response_ids, action=action, observation=after)
    return trajectory


def texts(demonstrations: Sequence[Demonstration]) -> list[str]:
    """All that is read and written in the demonstrations, for training a tokenizer."""
    found: list[str] = []
    for demonstration in demonstrations:
        for observation, action in zip(demonstration.observations, demonstration.actions, strict=True):
            found += [part for part in (observation.goal, observation.text, action) if part]
            found += observation.admissible_actions or ()
    # No tokenizer takes halves of surrogate pairs.
    return [text.encode("utf-8", "replace").decode() for text in found]


def _demonstration(task: Task, played: Sequence[Transition]) -> Demonstration:
    return Demonstration(task=task, observations=[t.observation for t in played], actions=[t.action for t in played])


def _digest(config: Config, suite: TaskSuite, tasks: Sequence[Task]) -> str:
    key = {
        "suite": suite.name,
        "options": config.environment.options,
        "provenance": suite.provenance(),
        "tasks": [asdict(task) for task in tasks],
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _read(path: Path) -> list[Demonstration]:
    def observation(fields: dict[str, Any]) -> Observation:
        actions = fields["admissible_actions"]
        return Observation(**{**fields, "admissible_actions": None if actions is None else tuple(actions)})

    try:
        return [
            Demonstration(
                task=Task(**d["task"]), observations=[observation(o) for o in d["observations"]], actions=d["actions"]
            )
            for d in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"the demonstrations in {str(path)!r} are damaged: delete the file to have them made anew"
        ) from None
