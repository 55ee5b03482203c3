"""What a run opens while it is on, and that a trainer killed without warning leaves nothing: no process, no file."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from process_table import LOOPBACK, alive, descendants, listening

Start = Callable[..., "subprocess.Popen[str]"]


def test_a_killed_trainer_leaves_no_worker_no_jvm_and_no_file(
    start_epo: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    trainer = start_epo(
        "train",
        "minute.yaml",
        "environment.suite=scienceworld",
        "environment.options={tasks: [lifespan-longest-lived]}",
        "imitation.demonstrations=60",
    )
    deadline = time.monotonic() + 120
    while list((started := descendants(trainer.pid)).values()).count("java") < 2:
        assert trainer.poll() is None and time.monotonic() < deadline, "two workers with a JVM each"
        time.sleep(0.1)
    while not (addresses := listening(descendants(trainer.pid))):  # a JVM has started and not opened its port yet
        assert trainer.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    assert addresses <= LOOPBACK
    started = descendants(trainer.pid)
    assert len(started) >= 4 and len(list(scratch.glob("epo-worker-*"))) == 2
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 20
    while left := alive(started) or list(scratch.iterdir()):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)
