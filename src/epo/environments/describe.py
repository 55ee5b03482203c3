"""What suites there are and what they offer, for `epo envs`."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

from epo.environments.base import TaskSuite
from epo.environments.registry import load_class, make_suite, required_options, resolve_suite, suite_names
from epo.errors import UserError


def list_suites() -> list[dict[str, Any]]:
    """Every known suite: its name, one line about it, whether it can be used here, and the options it must be given."""
    found: list[dict[str, Any]] = []
    for name in suite_names():
        summary, needs, problem = "", list[str](), None
        try:
            suite_class = load_class(name, resolve_suite(name))
            summary, needs = _documentation(suite_class).split("\n")[0], required_options(suite_class)
            problem = _missing(suite_class)
            if not needs and problem is None:
                make_suite(name)
        except UserError as error:
            problem = str(error)
        found.append({"name": name, "summary": summary, "ready": problem is None, "problem": problem, "needs": needs})
    return found


def describe_suite(name: str) -> dict[str, Any]:
    """A suite's documentation, and the size of each of its splits; none where that depends on options it must be given.

    Raises:
        UserError: unknown suite, or one that cannot be used here.
    """
    suite_class = load_class(name, resolve_suite(name))
    splits: dict[str, Any] = {}
    if not required_options(suite_class):
        suite = make_suite(name)
        splits = {split: suite.tasks(split) for split in suite.splits}
    return {
        "name": name,
        "documentation": _documentation(suite_class),
        "needs": required_options(suite_class),
        "splits": {
            split: {"tasks": len(tasks), "goals": len({task.goal for task in tasks})} for split, tasks in splits.items()
        },
    }


def _documentation(suite_class: type[TaskSuite]) -> str:
    return inspect.getdoc(suite_class) or ""


def _missing(suite_class: type[TaskSuite]) -> str | None:
    if suite_class.library is None or importlib.util.find_spec(suite_class.library[0]):
        return None
    module, extra = suite_class.library
    return f"the Python package {module!r} is not installed; pip install -e '.[{extra}]'"
