"""Prompt templates: one Jinja file each, for both contexts.

A template sees `goal`, `observation`, `admissible_actions` (or None), `turn` (from 0), `transcript` and `think` (bool),
`first` (the goal must be said: first turn of a transcript, every turn of a window), `actions` (all earlier actions),
and for the window context `history` (the last pairs: `.number`, `.observation`, `.action`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from epo.errors import UserError


@dataclass(frozen=True, slots=True)
class Pair:
    number: int
    observation: str
    action: str


class Prompt:
    """A template by shipped name or by path."""

    def __init__(self, name: str, *, think: bool, transcript: bool) -> None:
        self._name = name
        self._template = _load(name)
        self._think = think
        self._transcript = transcript

    def render(
        self,
        observation: str,
        *,
        goal: str,
        admissible_actions: Sequence[str] | None,
        history: Sequence[Pair] = (),
        actions: Sequence[str] = (),
    ) -> str:
        """The text of one user message.

        Raises:
            UserError: the template uses a name that it is not given, or does what the sandbox forbids.
        """
        try:
            return self._template.render(
                observation=observation,
                goal=goal,
                admissible_actions=admissible_actions,
                history=history,
                actions=actions,
                turn=len(actions),
                first=not self._transcript or not actions,
                think=self._think,
                transcript=self._transcript,
            )
        except Exception as error:  # a template is a program, and fails in any way that one does
            raise UserError(f"agent.prompt={self._name!r} cannot be rendered: {_reason(error)}") from None


def prompt_names() -> list[str]:
    """Names of the templates that ship with the package."""
    return sorted(f.name.removesuffix(".j2") for f in resources.files(__name__).iterdir() if f.name.endswith(".j2"))


def prompt_source(name: str) -> str:
    """The text of a template, by shipped name or by path.

    Raises:
        UserError: there is no such template.
    """
    shipped = resources.files(__name__) / f"{name}.j2"
    path = shipped if name in prompt_names() else Path(name)
    if not os.path.isfile(str(path)):  # unlike Path.is_file, never raises
        raise UserError(
            f"agent.prompt={name!r} is neither a shipped template ({', '.join(prompt_names())}) nor a file: "
            "give one of the names or the path of a Jinja file"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"agent.prompt={name!r} is not a valid Jinja template: {error}") from None


def _load(name: str) -> Template:
    # Sandboxed: a template file may come from somebody else.
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False, autoescape=False)
    source = prompt_source(name)
    try:
        return environment.from_string(source)
    except (TemplateError, RecursionError, ValueError, OverflowError) as error:
        raise UserError(f"agent.prompt={name!r} is not a valid Jinja template: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]
