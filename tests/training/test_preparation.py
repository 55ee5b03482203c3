"""Preparing a suite is a stage of a run, whatever form the suite's `prepare` has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from quiet import QuietObserver

from epo.config import Config
from epo.environments.corridor import CorridorSuite
from epo.errors import EnvironmentFailure
from epo.training import preparation


class Watching(QuietObserver):
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def begin(self, what: str, total: int) -> None:
        self.seen.append((what, total))

    def advance(self, done: int, note: str = "") -> None:
        self.seen.append((done,))


class Plain(CorridorSuite):
    was_prepared = False

    def prepare(self) -> None:
        self.was_prepared = True


class Counting(Plain):
    def prepare(self, *, progress: Callable[[int, int], None] | None = None) -> None:
        assert progress is not None
        progress(1, 2)
        progress(2, 2)
        super().prepare()


class TakingAnything(Plain):
    def prepare(self, **options: Any) -> None:
        assert not options
        super().prepare()


class Failing(CorridorSuite):
    def prepare(self) -> None:
        raise EnvironmentFailure("the simulator does not start")


@pytest.fixture
def prepare(minute_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> Callable[[type], Any]:
    """Prepares a suite of a class; returns it, and what the observer saw."""

    def run(kind: type[CorridorSuite]) -> Any:
        config, observer = minute_config(), Watching()
        monkeypatch.setattr(preparation, "make_suite", lambda _, options: kind(**options))
        return preparation.prepare_suite(config, observer), observer.seen

    return run


@pytest.mark.parametrize("kind", [Plain, TakingAnything])
def test_a_suite_that_counts_nothing(kind: type, prepare: Callable[[type], Any]):
    suite, seen = prepare(kind)
    assert suite.was_prepared and seen == [("prepare corridor", 0)]


def test_a_suite_that_counts(prepare: Callable[[type], Any]):
    suite, seen = prepare(Counting)
    assert suite.was_prepared
    assert seen == [("prepare corridor", 0), ("prepare corridor", 2), (1,), (2,)]


def test_a_suite_that_fails_says_which_it_is(prepare: Callable[[type], Any]):
    with pytest.raises(EnvironmentFailure, match=r"'corridor' failed: the simulator does not start; .* same command"):
        prepare(Failing)
