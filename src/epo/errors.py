"""The one error that users see. Everything else is a bug or a lost worker."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend. The message names the field, the value, and the fix; the CLI exits with code 2."""


class EnvironmentFailure(RuntimeError):
    """An environment process died, hung, or answered nonsense. Never the agent's fault."""
