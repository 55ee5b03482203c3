"""Suites by name: the built-in ones, those that installed packages offer, and those a program registers itself.

A suite is known as `module:Class` and imported only when it is asked for, so that no suite pays for another's
dependencies and a worker process can build its own copy from plain data.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from epo.environments.base import TaskSuite
from epo.errors import UserError

ENTRY_POINT_GROUP = "epo.environments"

_BUILT_IN = {
    "alfworld": "epo.environments.alfworld:AlfworldSuite",
    "corridor": "epo.environments.corridor:CorridorSuite",
    "gymnasium": "epo.environments.adapters.gymnasium:GymnasiumSuite",
    "household": "epo.environments.alfworld:HouseholdSuite",
    "mcp": "epo.environments.adapters.mcp:McpSuite",
    "openenv": "epo.environments.adapters.openenv:OpenEnvSuite",
    "reasoning_gym": "epo.environments.adapters.reasoning_gym:ReasoningGymSuite",
    "scienceworld": "epo.environments.scienceworld:ScienceWorldSuite",
    "textarena": "epo.environments.adapters.textarena:TextArenaSuite",
    "textworld": "epo.environments.adapters.textworld:TextWorldSuite",
}
_EXTRA = {"alfworld": "alfworld", "household": "alfworld", "scienceworld": "scienceworld"}
_registered: dict[str, str] = {}


def register_suite(name: str, target: str) -> None:
    """Make a suite known to this process and to the pools it creates, without packaging it.

    Args:
        name: what `make_suite` and recipes call it.
        target: `module:Class`; the module must be importable from `sys.path` (a worker process imports it afresh).

    Raises:
        UserError: the name is taken by something else, or the target has not the form `module:Class`.
    """
    module, _, attribute = target.partition(":")
    if not module or not attribute:
        raise UserError(f"suite {name!r}: target {target!r} must have the form 'module:Class'")
    known = _targets().get(name)
    if known not in (None, target):
        raise UserError(f"suite {name!r} already exists as {known}; choose another name")
    _registered[name] = target


def suite_names() -> list[str]:
    """The names of all known suites, sorted. Imports none of them."""
    return sorted(_targets())


def make_suite(name: str, options: Mapping[str, Any] | None = None) -> TaskSuite:
    """Build a suite from its name and its options (plain data, as written in a recipe).

    Raises:
        UserError: unknown suite, unknown or missing option, an option of the wrong type, or a package that is not
            installed; the message says what would be right.
    """
    return load_suite(name, resolve_suite(name), options)


def resolve_suite(name: str) -> str:
    """The `module:Class` behind a suite's name.

    Raises:
        UserError: unknown suite.
    """
    targets = _targets()
    if name not in targets:
        raise UserError(f"unknown suite {name!r}{_nearest(name, targets)}; known suites: {', '.join(sorted(targets))}")
    return targets[name]


def load_suite(name: str, target: str, options: Mapping[str, Any] | None = None) -> TaskSuite:
    """`make_suite` for a target that is resolved already, as workers receive it."""
    suite_class = load_class(name, target)
    options = dict(options or {})
    _check_options(name, suite_class, options)
    missing = required_options(suite_class, options)
    if missing:
        raise UserError(f"suite {name!r} needs the option {missing[0]!r}")
    return suite_class(**options)


def load_class(name: str, target: str) -> type[TaskSuite]:
    """The class behind a suite's target, which needs none of the suite's options.

    Raises:
        UserError: a package is not installed, or it is no suite.
    """
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        hint = f"pip install -e '.[{_EXTRA[name]}]'" if name in _EXTRA else f"install what {target} needs"
        raise UserError(f"suite {name!r}: the Python package {error.name!r} is not installed; {hint}") from error
    suite_class = getattr(module, attribute, None)
    if not (isinstance(suite_class, type) and issubclass(suite_class, TaskSuite)):
        raise UserError(f"suite {name!r}: {target} is not a TaskSuite class")
    return suite_class


def required_options(suite_class: type[TaskSuite], given: Iterable[str] = ()) -> list[str]:
    """Names of the options that have no default and are not `given`."""
    return [key for key, p in _named(suite_class).items() if p.default is p.empty and key not in given]


def _named(suite_class: type[TaskSuite]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(suite_class).parameters
    return {key: p for key, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def _targets() -> dict[str, str]:
    from importlib.metadata import entry_points  # 30 ms that workers need not spend

    targets = dict(_BUILT_IN)
    offers = [(point.name, point.value) for point in entry_points(group=ENTRY_POINT_GROUP)]
    for name, target in [*offers, *_registered.items()]:
        if targets.setdefault(name, target) != target:
            raise UserError(f"suite {name!r} is offered twice, as {targets[name]} and as {target}; uninstall one")
    return targets


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""


def _check_options(name: str, suite_class: type[TaskSuite], options: Mapping[str, Any]) -> None:
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(suite_class).parameters.values())
    named = _named(suite_class)
    hints = get_type_hints(suite_class.__init__)
    for key, value in options.items():
        if key not in named and not takes_any:
            known = f"its options: {', '.join(named)}" if named else "it takes no options"
            raise UserError(f"suite {name!r} has no option {key!r}{_nearest(key, named)}; {known}")
        if not _fits(value, hints.get(key, Any)):
            raise UserError(f"suite {name!r}: option {key!r} must be {_describe(hints[key])}, not {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether plain data has the annotated type. Lists pass for tuples, text for paths, integers for floats."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    kind = origin or hint
    if kind is Any or not isinstance(kind, type):  # nothing that could be checked
        return True
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if kind is Path:
        return isinstance(value, (str, Path))
    if issubclass(kind, Mapping):
        of_key, of_value = arguments or (Any, Any)
        return isinstance(value, Mapping) and all(_fits(k, of_key) and _fits(v, of_value) for k, v in value.items())
    if issubclass(kind, Sequence) and kind is not str:
        if not isinstance(value, (list, tuple)):
            return False
        if kind is tuple and arguments and arguments[-1] is not ...:
            return len(value) == len(arguments) and all(map(_fits, value, arguments))
        return all(_fits(item, arguments[0]) for item in value if arguments)
    return isinstance(value, kind)


def _describe(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_describe(argument) for argument in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(argument) for argument in get_args(hint))
    if hint is NoneType:
        return "null"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
