"""What is asked of an agent with tools: a file of tasks, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from epo.errors import UserError

_KEYS = {"goal", "check", "id", "split", "kind", "setup", "demonstration"}
_CALL_KEYS = {"tool", "arguments"}


class Call(NamedTuple):
    """One call of a tool."""

    tool: str
    arguments: dict[str, Any]

    def as_action(self) -> str:
        """As the agent writes it."""
        return json.dumps({"tool": self.tool, "arguments": self.arguments}, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A call whose result decides success: it equals `equals`, or its text contains `contains`, or else it is true."""

    call: Call
    expected: Mapping[str, Any]
    """Empty, `{"equals": ...}` or `{"contains": ...}`."""

    def passes(self, *, value: Any, text: str) -> bool:
        """Whether a result says so. `value`: as structured data, where the tool gives any; else `text`."""
        if "contains" in self.expected:
            return self.expected["contains"] in text
        wanted = self.expected.get("equals", True)
        # 1 is not True here, as it is not in JSON.
        return (type(value) is type(wanted) and value == wanted) or (wanted is True and text.strip().lower() == "true")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolTask:
    """One line of the file."""

    id: str
    split: str
    goal: str
    kind: str
    """What reports group tasks by."""
    setup: tuple[Call, ...]
    check: Check
    demonstration: tuple[Call, ...] | None


def read_tasks(path: Path) -> list[ToolTask]:
    """All tasks of a file.

    Raises:
        UserError: it cannot be read, or a line is no task; says which line and why.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"suite 'mcp': cannot read the tasks in {str(path)!r}: {error}") from None
    tasks: dict[str, ToolTask] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            task = _task(json.loads(line), default_id=str(number))
        except (ValueError, RecursionError) as error:
            raise UserError(f"suite 'mcp': {path}, line {number}: {error}") from None
        if task.id in tasks:
            raise UserError(f"suite 'mcp': {path}, line {number}: the id {task.id!r} is there twice")
        tasks[task.id] = task
    if not tasks:
        raise UserError(f"suite 'mcp': there is no task in {str(path)!r}")
    return list(tasks.values())


def _task(line: Any, *, default_id: str) -> ToolTask:
    found = _object(line, "a task", keys=_KEYS)
    split = _text(found.get("split", "train"), "split")
    demonstration = found.get("demonstration")
    check = _object(found.get("check"), "check", keys=_CALL_KEYS | {"equals", "contains"})
    expected = {key: check[key] for key in ("equals", "contains") if key in check}
    if len(expected) > 1:
        raise ValueError("check: equals and contains exclude each other")
    if "contains" in expected:
        _text(expected["contains"], "check.contains")
    return ToolTask(
        id=f"{split}/{_text(found.get('id', default_id), 'id')}",
        split=split,
        goal=_text(found.get("goal"), "goal"),
        kind=_text(found.get("kind", "tools"), "kind"),
        setup=_calls(found.get("setup", []), "setup"),
        check=Check(call=_call({key: check[key] for key in check if key in _CALL_KEYS}, "check"), expected=expected),
        demonstration=None if demonstration is None else _calls(demonstration, "demonstration"),
    )


def _calls(value: Any, what: str) -> tuple[Call, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list of calls")
    return tuple(_call(entry, f"{what}[{n}]") for n, entry in enumerate(cast("list[Any]", value)))


def _call(value: Any, what: str) -> Call:
    found = _object(value, what, keys=_CALL_KEYS)
    arguments = _object(found.get("arguments", {}), f"{what}.arguments")
    return Call(_text(found.get("tool"), f"{what}.tool"), arguments)


def _object(value: Any, what: str, *, keys: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a JSON object, not {json.dumps(value)[:80]}")
    found = cast("dict[str, Any]", value)
    unknown = sorted(set(found) - keys) if keys is not None else []
    if unknown:
        raise ValueError(f"{what} has no key {unknown[0]!r}, only {', '.join(sorted(keys or ()))}")
    return found


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} must be a text, not {json.dumps(value)[:80]}")
    return value
