"""The errors that users see. Everything else is a bug or something that was lost."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend. The message names the field, the value, and the fix; the CLI exits with code 2."""


class EnvironmentFailure(RuntimeError):
    """An environment process died, hung, or answered nonsense. Never the agent's fault. The CLI exits with code 1."""


class StorageError(OSError):
    """The disk takes no more. What was being written is not half there; the CLI exits with code 1."""

    def __str__(self) -> str:
        return str(self.strerror)


class LearnerLost(RuntimeError):
    """A process or machine of the learner is gone, and with it what it learnt since the newest checkpoint. The CLI
    exits with code 1."""
