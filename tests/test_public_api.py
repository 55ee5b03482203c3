"""The public interface is what `public_api.txt` says: what changes it is a decision, and belongs into the changelog.

After a change that is meant: `python tests/test_public_api.py`, which writes the file anew.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import typer

RECORD = Path(__file__).with_name("public_api.txt")
MODULES = (
    "epo.objectives",
    "epo.objectives.control",
    "epo.types",
    "epo.errors",
    "epo.environments",
    "epo.environments.base",
    "epo.integrations.trl",
)


def public_names(module: Any) -> list[str]:
    own = getattr(module, "__all__", None)
    if own is None:
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__]
    return sorted(name for name in own if not name.startswith("_"))


def default_values(kind: type) -> dict[str, Any]:
    """Of the fields of a dataclass or a named tuple."""
    if not is_dataclass(kind):
        return getattr(kind, "_field_defaults", {})
    return {
        field.name: "made anew" if field.default is MISSING else field.default
        for field in fields(kind)
        if field.default is not MISSING or field.default_factory is not MISSING
    }


def described(name: str, value: Any) -> Iterator[str]:
    """A line for a function or a constant; for a class its members below it."""
    if inspect.isclass(value):
        bases = [base.__name__ for base in value.__bases__ if base is not object]
        yield f"class {name}({', '.join(bases)})"
        if issubclass(value, Enum):
            yield from (f"  {member.name} = {member.value!r}" for member in value)
            return
        defaults = default_values(value)
        for member, kind in sorted(inspect.get_annotations(value).items()):
            if not member.startswith("_"):
                shown = f" = {defaults[member]!r}" if member in defaults else ""
                yield f"  {member}: {kind if isinstance(kind, str) else getattr(kind, '__forward_arg__', kind)}{shown}"
        has_made_up_init = is_dataclass(value) or issubclass(value, tuple)
        for member, own in sorted(vars(value).items()):
            if member.startswith("_") and (member != "__init__" or has_made_up_init):
                continue
            function = own.__func__ if isinstance(own, classmethod | staticmethod) else own
            if isinstance(own, property):
                yield f"  {member} (property)"
            elif inspect.isfunction(function):
                yield f"  {member}{inspect.signature(function)}"
    elif callable(value):
        yield f"{name}{inspect.signature(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def commands(group: Any, prefix: str) -> Iterator[str]:
    for name, command in sorted(group.commands.items()):
        parameters = " ".join(
            "/".join((*p.opts, *p.secondary_opts)) if p.param_type_name == "option" else p.name.upper()
            for p in command.params
        )
        yield f"{prefix} {name} {parameters}".rstrip()
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")


def public_api() -> str:
    from epo.cli import app

    lines: list[str] = []
    for name in MODULES:
        module = importlib.import_module(name)
        lines.append(f"# {name}")
        for public in public_names(module):
            lines += described(public, getattr(module, public))
        lines.append("")
    lines += ["# the command line", *commands(typer.main.get_command(app), "epo")]
    return "\n".join(lines) + "\n"


def test_the_public_interface_is_the_recorded_one():
    assert public_api().splitlines() == RECORD.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    RECORD.write_text(public_api(), encoding="utf-8")
