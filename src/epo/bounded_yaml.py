"""YAML from files that anybody may have written: plain data, or one reason why not, in bounded time and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import yaml

MAX_DEPTH = 40
MAX_VALUES = 100_000
"""Aliases counted as often as they occur: a few lines can stand for billions of values."""
MAX_INTEGER_BITS = 64


def load_yaml(text: str) -> Any:
    """What `text` says.

    Raises:
        ValueError: it is no YAML, or not of bounded size; the reason is one line.
    """
    try:
        # Not the C loader, which deep nesting overflows the stack of.
        tree = yaml.safe_load(text)
    # Besides its own errors PyYAML lets those of Python's constructors through: 2024-13-45 is a ValueError.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None
    check_plain(tree)
    return tree


def check_plain(tree: Any) -> None:
    """Refuse what could not be handled or written down again.

    Raises:
        ValueError: nested too deeply (or without end), too many values, an integer of more than 64 bits, or text with
            halves of surrogate pairs, which no file can hold, or with a NUL, which no path can.
    """
    waiting: list[tuple[Any, int]] = [(tree, 0)]
    values = 0
    while waiting:
        value, depth = waiting.pop()
        values += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        if values > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values, aliases counted as often as they occur")
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise ValueError(f"it holds an integer of {value.bit_length()} bits; at most {MAX_INTEGER_BITS} are taken")
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"it holds a text that is no Unicode: {value[:60]!r}") from None
            if "\0" in value:
                raise ValueError(f"it holds a text with a NUL in it: {value[:60]!r}")
        if isinstance(value, Mapping):
            entries = cast("Mapping[Any, Any]", value)
            waiting += [(part, depth + 1) for entry in entries.items() for part in entry]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += [(part, depth + 1) for part in cast("list[Any]", value)]
