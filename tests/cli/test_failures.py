"""What fails without being the user's mistake: one line that says how to go on, exit code 1, never a traceback."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from epo import errors
from epo.errors import EnvironmentFailure, LearnerLost, UserError
from epo.training import session

Epo = Callable[..., Any]
KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


def one_line_failure(result: Any) -> str:
    assert result.code == 1 and result.out == "", result
    assert "Traceback" not in result.err and result.err.count("error: ") == 1
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_of_ours_is_one_line(kind: type[Exception], epo: Epo, monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        said = "what happened,\nin two lines"
        raise kind(5, said) if issubclass(kind, OSError) else kind(said)

    monkeypatch.setattr("epo.doctor.examine", fail)
    result = epo("doctor")
    assert result.code == (2 if issubclass(kind, UserError) else 1) and "Traceback" not in result.err
    lines = result.err.splitlines()
    assert lines[0].startswith("error: what happened,")
    assert len(lines) == 1 or issubclass(kind, UserError)


def test_games_that_cannot_be_made(epo: Epo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("alfworld")
    (tmp_path / "textworld").mkdir()  # found first by the processes that make the games
    (tmp_path / "textworld/__init__.py").write_text("raise OSError('the engine is broken')")
    monkeypatch.syspath_prepend(tmp_path)
    options = [f"environment.options={{cache: {tmp_path / 'games'}, counts: {{train: 1, iid: 1, ood: 1}}}}"]
    message = one_line_failure(epo("train", "minute.yaml", "environment.suite=household", *options))
    for part in ("'household'", "the engine is broken", "ended with code 1", "run the same command again"):
        assert part in message
    assert not Path("runs/minute").exists() and list((tmp_path / "games/household").iterdir()) == []
    played = epo("play", "household", f"cache={tmp_path / 'games'}")
    assert "the engine is broken" in one_line_failure(played)


def test_an_environment_that_fails_under_a_person(epo: Epo, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise EnvironmentFailure("the simulator is gone")

    monkeypatch.setattr("epo.environments.corridor.CorridorEnv.reset", fail)
    assert one_line_failure(epo("play", "corridor")) == "error: the simulator is gone"


@pytest.mark.parametrize(("lost_at", "safe"), [(0, "nothing was left behind"), (2, "go on after step 1 with --resume")])
def test_a_learner_lost_too_often(lost_at: int, safe: str, epo: Epo, monkeypatch: pytest.MonkeyPatch):
    """The learner is lost before the first step, or in the second: what is safe is said, and it is."""
    place = session.open_place

    @contextmanager
    def losing(*arguments: Any) -> Iterator[Any]:
        with place(*arguments) as opened:
            yield _Losing(opened, lost_at)

    monkeypatch.setattr(session, "open_place", losing)
    message = one_line_failure(epo("train", "minute.yaml", "checkpoint.every=1", "cluster.max_losses=0"))
    assert "rank 0 is gone" in message and "cluster.max_losses=0" in message
    assert safe in message
    monkeypatch.setattr(session, "open_place", place)
    resume = ["--resume"] if Path("runs/minute").exists() else []
    assert epo("train", "minute.yaml", "checkpoint.every=1", "cluster.max_losses=0", *resume).code == 0


class _Losing:
    """A place whose learner is lost in a step: 0 for before the first."""

    def __init__(self, place: Any, step: int) -> None:
        self._place, self._step = place, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._place, name)

    @contextmanager
    def parts(self, *arguments: Any) -> Iterator[Any]:
        if self._step == 0:
            raise LearnerLost("rank 0 is gone")
        with self._place.parts(*arguments) as parts:
            update = parts.learner.update

            def losing(groups: Any, *, step: int) -> Any:
                if step + 1 == self._step:
                    raise LearnerLost("rank 0 is gone")
                return update(groups, step=step)

            parts.learner.update = losing
            yield parts
