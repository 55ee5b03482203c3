"""A person at the keyboard in place of the agent, for `epo play`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from epo.environments.registry import make_suite
from epo.errors import UserError
from epo.reporting.terminal.text import visible, visible_lines
from epo.types import Observation

MAX_LISTED = 60
"""Admissible actions shown at once; some suites have thousands."""


def play_episode(suite_name: str, options: Mapping[str, Any], *, split: str, task_id: str | None) -> None:
    """Play one episode on the terminal.

    Raises:
        UserError: unknown suite, option, split or task.
    """
    console = Console(highlight=False, markup=False)
    suite = make_suite(suite_name, options)
    suite.prepare()
    tasks = {task.id: task for task in suite.tasks(split)}
    if not tasks:
        raise UserError(f"the split {split!r} of suite {suite_name!r} has no tasks")
    if task_id is None:
        task_id = next(iter(tasks))
    if task_id not in tasks:
        raise UserError(
            f"suite {suite_name!r} has no task {task_id!r} in split {split!r}; for example {next(iter(tasks))!r}"
        )
    with suite.make_env() as env:
        observation = env.reset(tasks[task_id])
        console.print(f"task {visible(task_id)}\n{visible_lines(observation.goal or '')}\n")
        turns = 0
        while True:
            _show(console, observation)
            try:
                action = _read_line()
            except EOFError:
                action = ""
            if not action:
                console.print(f"left after {turns} turns")
                return
            step = env.step(action)
            turns += 1
            observation = step.observation
            if step.terminated or step.truncated:
                console.print(f"{visible_lines(observation.text)}\n")
                console.print(f"{'success' if step.success else 'failure'} after {turns} turns, score {step.score:.2f}")
                return


def _show(console: Console, observation: Observation) -> None:
    console.print(visible_lines(observation.text))
    if observation.admissible_actions:
        shown = observation.admissible_actions[:MAX_LISTED]
        more = len(observation.admissible_actions) - len(shown)
        console.print("actions: " + visible("; ".join(shown)) + (f"; and {more} more" if more else ""), style="dim")


def _read_line() -> str:
    if sys.stdin.isatty():
        return input("> ").strip()
    line = sys.stdin.readline()
    return line.strip()
