"""Suites are found by name, and mistakes in names and options are answered with what would be right."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

import pytest

from epo.environments import TaskSuite, TextEnv, make_suite, register_suite, registry, suite_names
from epo.environments.corridor import CorridorSuite
from epo.errors import UserError
from epo.types import Task


class PlainSuite(TaskSuite):
    """Takes an option of every kind that a recipe can hold."""

    name = "plain"

    def __init__(
        self,
        *,
        number: int,
        share: float = 0.5,
        flag: bool = False,
        word: str = "",
        mode: Literal["fast", "slow"] = "fast",
        names: list[str] | None = None,
        flags: Sequence[str] = (),
        span: tuple[int, int] = (0, 1),
        many: tuple[int, ...] = (),
        table: dict[str, int] | None = None,
        path: Path | None = None,
        anything: Any = None,
    ) -> None:
        self.options = {key: value for key, value in locals().items() if key not in ("self", "__class__")}

    def tasks(self, split: str) -> Sequence[Task]:
        return []

    def make_env(self) -> TextEnv:
        raise NotImplementedError


register_suite("plain", f"{__name__}:PlainSuite")


def test_suites_are_built_by_name():
    assert {"alfworld", "corridor", "household", "scienceworld", "plain"} <= set(suite_names())
    assert suite_names() == sorted(suite_names())
    suite = make_suite("corridor", {"length": 3, "tasks": 4})
    assert isinstance(suite, CorridorSuite)
    assert suite.tasks("ood") == CorridorSuite(length=3, tasks=4).tasks("ood")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share": 1},
        {"flag": True, "word": "x", "mode": "slow"},
        {"names": ["a"], "flags": ["-v"], "span": [1, 2], "many": [1, 2, 3]},
        {"names": None, "table": {"a": 1}, "path": "/data"},
        {"path": Path("/data"), "anything": object()},
    ],
)
def test_options_of_the_right_type_arrive_unchanged(options: dict[str, Any]):
    suite = make_suite("plain", {"number": 1, **options})
    assert isinstance(suite, PlainSuite)
    assert suite.options.items() >= options.items()


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("number", "1", "int"),
        ("number", 1.0, "int"),
        ("number", True, "int"),
        ("share", "half", "float"),
        ("share", False, "float"),
        ("flag", 1, "bool"),
        ("word", 3, "str"),
        ("mode", "medium", "one of 'fast', 'slow'"),
        ("names", "boil", r"list\[str\] or null"),
        ("names", [1], r"list\[str\] or null"),
        ("flags", "-v", "Sequence"),
        ("span", [1, 2, 3], "tuple"),
        ("span", [1, "2"], "tuple"),
        ("many", [1, "2"], "tuple"),
        ("table", {"a": "1"}, "dict"),
        ("path", 3, "Path or null"),
    ],
)
def test_options_of_the_wrong_type_are_refused(option: str, value: Any, expected: str):
    with pytest.raises(UserError, match=f"suite 'plain': option '{option}' must be .*{expected}.*, not "):
        make_suite("plain", {"number": 1, option: value})


def test_wrong_names_are_answered_with_the_nearest():
    with pytest.raises(
        UserError, match=r"'sciencewrld', did you mean 'scienceworld'\?; known suites: alfworld, .*corridor"
    ):
        make_suite("sciencewrld")
    with pytest.raises(UserError, match=r"unknown suite 'zzz'; known suites"):
        make_suite("zzz")
    with pytest.raises(UserError, match=r"no option 'lenght', did you mean 'length'\?; its options: length, choices"):
        make_suite("corridor", {"lenght": 3})
    with pytest.raises(UserError, match="needs the option 'number'"):
        make_suite("plain", {})


def test_targets_that_are_no_suites_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_registered", {})
    register_suite("function", "faulty_suites:not_a_suite")
    with pytest.raises(UserError, match="faulty_suites:not_a_suite is not a TaskSuite class"):
        make_suite("function")
    register_suite("absent", "no_such_package.suites:Suite")
    with pytest.raises(UserError, match="package 'no_such_package' is not installed"):
        make_suite("absent")
    with pytest.raises(UserError, match="form 'module:Class'"):
        register_suite("shapeless", "faulty_suites")
    with pytest.raises(UserError, match=r"already exists as .*:CorridorSuite"):
        register_suite("corridor", "faulty_suites:FaultySuite")


def test_installed_packages_offer_suites(monkeypatch: pytest.MonkeyPatch):
    def offer(name: str, value: str) -> None:
        points = [EntryPoint(name, value, "epo.environments")]
        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda *, group: [p for p in points if p.group == group]
        )

    offer("theirs", f"{__name__}:PlainSuite")
    assert "theirs" in suite_names()
    assert isinstance(make_suite("theirs", {"number": 2}), PlainSuite)
    offer("corridor", "theirs:Corridor")
    with pytest.raises(UserError, match="'corridor' is offered twice"):
        make_suite("corridor")


def test_naming_suites_imports_none_of_them():
    code = "import sys, epo.environments as e; e.suite_names(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "epo.environments.registry" in modules
    loaded = {"torch", "scienceworld", "alfworld", "textworld", "epo.environments.corridor", "pydantic"} & set(modules)
    assert not loaded
