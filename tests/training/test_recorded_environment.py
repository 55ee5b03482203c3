"""A run goes on in the environment it recorded, and says which one that is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quiet import QuietObserver

from epo.config import Config
from epo.environments.corridor import CorridorSuite
from epo.errors import UserError
from epo.training.run_folder import RunFolder
from epo.training.session import train_run

MakeConfig = Callable[..., Config]


def is_of(monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any]) -> None:
    monkeypatch.setattr(CorridorSuite, "provenance", lambda self: facts)


def test_another_environment_is_refused_on_resume(
    minute_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, run = minute_config("steps=1", "evaluation.every=0"), tmp_path / "run"
    is_of(monkeypatch, {"versions": {"doors": "1.0"}, "games_sha256": "ab" * 32, "note": "old", "java": "17"})
    started = QuietObserver()
    summary = train_run(config, run, started, resume=False)
    assert "environment: corridor (games_sha256 abababababab, doors 1.0)" in started.notes
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    is_of(monkeypatch, {"versions": {"doors": "2.0"}, "games_sha256": "cd" * 32, "note": "new", "java": "21"})
    with pytest.raises(UserError) as refused:
        train_run(config, run, QuietObserver(), resume=True)
    for part in (
        "of suite 'corridor'",
        'versions.doors ("1.0" then, "2.0" now)',
        f'games_sha256 ("{"ab" * 32}" then, "{"cd" * 32}" now)',
        "install that version",
        "another --name",
    ):
        assert part in str(refused.value)
    assert "java" not in str(refused.value) and "note" not in str(refused.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    # Other words, another machine, and facts that were not recorded do not matter.
    is_of(monkeypatch, {"versions": {"doors": "1.0", "walls": "3"}, "games_sha256": "ab" * 32, "note": "new"})
    assert train_run(config, run, QuietObserver(), resume=True) == summary
    # Nor does anything to a run that recorded nothing.
    is_of(monkeypatch, {"versions": {"doors": "2.0"}})
    recorded = RunFolder.open(run).provenance()
    del recorded["suite"]
    (run / "provenance.json").write_text(json.dumps(recorded))
    assert train_run(config, run, QuietObserver(), resume=True)["suite"] is None
