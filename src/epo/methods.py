"""The entropy control methods described: summary, documentation and options, read off their classes."""

from __future__ import annotations

import inspect
import re
from typing import Any

from epo.errors import UserError
from epo.objectives.control import METHODS, method_options


def list_methods() -> list[dict[str, str]]:
    """Name and summary of every method."""
    return [{"name": name, "summary": method.summary} for name, method in METHODS.items()]


def describe_method(method: str) -> dict[str, Any]:
    """Everything a user may want to know of a method before choosing it.

    Raises:
        UserError: an unknown method.
    """
    try:
        defaults = method_options(method)
    except ValueError as error:
        raise UserError(str(error)) from None
    found = METHODS[method]
    meanings = argument_docs(found.control.__init__)
    return {
        "name": method,
        "summary": found.summary,
        "documentation": inspect.getdoc(found.control) or "",
        "options": [
            {"name": name, "default": default, "meaning": meanings.get(name, "")} for name, default in defaults.items()
        ],
    }


def argument_docs(function: Any) -> dict[str, str]:
    """The entries of the `Args:` part of a docstring, each on one line."""
    doc = inspect.getdoc(function) or ""
    _, _, arguments = doc.partition("Args:\n")
    arguments = re.split(r"\n(?=\S)", arguments)[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
