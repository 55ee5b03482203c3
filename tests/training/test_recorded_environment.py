"""A run goes on in the environment it recorded, and says which one that is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quiet import QuietObserver

from epo.config import Config
from epo.environments.corridor import CorridorSuite
from epo.errors import UserError
from epo.training import hardware
from epo.training.hardware import memory_note
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


def test_the_memory_of_a_run_is_estimated_before_its_first_step(minute_config: MakeConfig, tmp_path: Path):
    observer = QuietObserver()
    train_run(minute_config("steps=0"), tmp_path / "run", observer, resume=False)
    (note,) = [note for note in observer.notes if note.startswith("memory: ")]
    assert "estimated peak of 0." in note and "GiB" in note and "usable here" in note


def test_an_estimate_of_memory_never_ends_a_run(minute_config: MakeConfig, monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    large = minute_config("model.path=Qwen2.5-7B", "model.compute=float32", "imitation.demonstrations=0")
    monkeypatch.setattr(hardware, "parse_hardware", lambda text: hardware.gpu_here("a GPU", 2))
    assert "more than the 1.8 usable here; epo plan says what would fit" in memory_note(large, cpu)
    unknown = minute_config("model.path=nowhere/unknown", "imitation.demonstrations=0")
    assert memory_note(unknown, cpu) == "memory: no estimate; epo plan says why"

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(hardware, "make_plan", fail)
    assert memory_note(large, cpu) == "memory: no estimate; epo plan says why"
