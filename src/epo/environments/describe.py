"""What suites there are and what they offer, for `epo envs`."""

from __future__ import annotations

import inspect
from typing import Any

from epo.environments.registry import make_suite, suite_names
from epo.errors import UserError


def list_suites() -> list[dict[str, Any]]:
    """Every known suite: its name, one line about it, and whether it can be used here."""
    found: list[dict[str, Any]] = []
    for name in suite_names():
        summary, problem = "", None
        try:
            suite = make_suite(name)
            summary = inspect.getdoc(type(suite)) or ""
        except UserError as error:
            problem = str(error)
        found.append({"name": name, "summary": summary.split("\n")[0], "ready": problem is None, "problem": problem})
    return found


def describe_suite(name: str) -> dict[str, Any]:
    """A suite's documentation, and the size of each of its splits.

    Raises:
        UserError: unknown suite, or one that cannot be used here.
    """
    suite = make_suite(name)
    splits = {split: suite.tasks(split) for split in suite.splits}
    return {
        "name": name,
        "documentation": inspect.getdoc(type(suite)) or "",
        "splits": {
            split: {"tasks": len(tasks), "goals": len({task.goal for task in tasks})} for split, tasks in splits.items()
        },
    }
