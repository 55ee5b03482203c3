"""Which environment a run was in: what it recorded of its suite, made comparable and said in a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

_NO_MATTER = ("note", "java", "url")
"""Facts that may change without the episodes changing: words for people, and what the suite happens to run on."""
_SHOWN = 80
"""Letters of a value in a message; a SHA-256 has 64."""
_NAMED = 3
"""Runs named for a value; the others are counted."""


def suite_facts(recorded: object) -> dict[str, str]:
    """What decides the episodes, of a suite's record: names such as `versions.textworld`, and values as text.

    Empty for what is no record. Unknown values, notes, and what belongs to the machine are left out.
    """
    if not isinstance(recorded, Mapping):
        return {}
    known = cast("Mapping[Any, Any]", recorded)
    try:
        return _flat({key: value for key, value in known.items() if key not in _NO_MATTER})
    except RecursionError:  # of a file that somebody else wrote
        return {}


def changed_facts(before: object, now: object) -> list[str]:
    """Facts on which two records of a suite disagree, each with both values. What one of them lacks is no change."""
    old, new = suite_facts(before), suite_facts(now)
    return [
        f"{name} ({_short(value)} then, {_short(new[name])} now)"
        for name, value in old.items()
        if name in new and new[name] != value
    ]


def differing_facts(records: Sequence[tuple[str, object]]) -> list[str]:
    """Facts on which the records of several runs, each with its name, disagree: every value and who recorded it."""
    found: dict[str, dict[str, list[str]]] = {}
    for run, recorded in records:
        for name, value in suite_facts(recorded).items():
            found.setdefault(name, {}).setdefault(value, []).append(run)
    return [
        f"{name} ({', '.join(f'{_short(value)} in {_listed(runs)}' for value, runs in by_value.items())})"
        for name, by_value in found.items()
        if len(by_value) > 1
    ]


def describe_suite_record(recorded: Mapping[str, Any]) -> str:
    """One line for people: the suite, versions, and the beginning of every hash. Options are in the configuration."""
    hidden = ("name", *_NO_MATTER)
    shown = {key: value for key, value in recorded.items() if isinstance(value, str) and key not in hidden}
    versions = recorded.get("versions")
    shown |= cast("dict[str, str]", versions) if isinstance(versions, dict) else {}
    parts = [f"{key} {str(value)[:12] if key.endswith('sha256') else value}" for key, value in shown.items()]
    return f"{recorded['name']} ({', '.join(parts)})" if parts else str(recorded["name"])


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = prefix + json.dumps(str(key))[1:-1]
        if isinstance(value, Mapping):
            flat |= _flat(cast("Mapping[Any, Any]", value), f"{name}.")
        elif value is not None:
            # As JSON: a tuple and the list that is read of it are the same, and nothing in it acts on a terminal.
            flat[name] = json.dumps(value, sort_keys=True)
    return flat


def _short(value: str) -> str:
    return value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."


def _listed(runs: Sequence[str]) -> str:
    return ", ".join(runs[:_NAMED]) + (f" and {len(runs) - _NAMED} more" if len(runs) > _NAMED else "")
