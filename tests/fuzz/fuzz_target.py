"""What a target is: it opens whatever it needs and gives a function that throws one case at the real code.

A case is accepted or refused: refused by the one error that users see, `UserError`, in one line, or, where an
environment is at fault, as an episode that ends with `StopReason.ENVIRONMENT_ERROR`. Everything else is a crash.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from fuzz_guard import contained
from typer.testing import CliRunner

from epo.cli import app
from epo.errors import UserError

Verdict = Literal["accepted", "refused"]
Throw = Callable[[random.Random], Verdict]


@dataclass(frozen=True, kw_only=True)
class Target:
    name: str
    what: str
    """For the table in the docs."""
    open: Callable[[Path], AbstractContextManager[Throw]]
    bounded: int
    """Cases in `make test`."""
    full: int
    """Cases in `make fuzz`."""
    seconds: float = 20.0
    """A case that takes longer hangs."""
    has_workers: bool = False


TARGETS: dict[str, Target] = {}


def target(
    what: str, *, bounded: int, full: int, seconds: float = 20.0, has_workers: bool = False
) -> Callable[[Callable[[Path], Iterator[Throw]]], Any]:
    def register(function: Callable[[Path], Iterator[Throw]]) -> Any:
        name = function.__name__
        opened = contextmanager(function)
        TARGETS[name] = Target(
            name=name, what=what, open=opened, bounded=bounded, full=full, seconds=seconds, has_workers=has_workers
        )
        return opened

    return register


def throw_case(chosen: Target, throw: Throw, rng: random.Random, folder: Path) -> Verdict:
    """One case under watch. Raises whatever is wrong."""
    with contained(folder=folder, seconds=chosen.seconds, has_workers=chosen.has_workers):
        try:
            return throw(rng)
        except UserError as error:
            message = str(error)
            assert message.strip() and len(message.splitlines()) == 1, f"not one line: {message[:300]!r}"
            assert len(message) < 5000, f"{len(message)} characters of error"
            return "refused"


def epo(*arguments: str) -> None:
    """The command line in this process; a usage error is a refusal too."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code == 2:
        raise UserError(f"usage: {result.output.strip().splitlines()[-1:]}")
    assert result.exit_code == 0, result.output


def dump_yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
