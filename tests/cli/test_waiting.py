"""A log file of a run shows what is awaited: a suite that is being prepared, an environment that hangs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epo.environments import registry
from epo.reporting.terminal import console

SLOW = """
import time
from epo.environments.corridor import CorridorEnv, CorridorSuite

class SlowSuite(CorridorSuite):
    def prepare(self, *, progress):
        for done in range(1, 4):
            time.sleep(0.5)
            progress(done, 3)

    def make_env(self):
        env = super().make_env()
        reset = env.reset

        def slow(task):
            if task.split == "iid":
                time.sleep(3)  # a call that hangs, though not to the end of the world
            return reset(task)

        env.reset = slow
        return env
"""


def test_what_a_run_without_a_terminal_waits_for(
    epo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "slow_suite.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry._registered, "slow", "slow_suite:SlowSuite")
    monkeypatch.setattr(console, "HEARTBEAT_SECONDS", 0.3)
    result = epo("train", "minute.yaml", "environment.suite=slow", "evaluation.episodes=1", "steps=1")
    assert result.code == 0, result.err
    for form in (
        r"prepare corridor: [12] of 3, \d+s in it; [12] to go, the last came \d+s ago",
        r"evaluate iid: 0 of 1, \d+s in it; 1 to go",
    ):
        assert re.search(f"^{form}$", result.err, re.MULTILINE), result.err
