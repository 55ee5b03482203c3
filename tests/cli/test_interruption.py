"""Real processes and real signals: what was asked to stop goes on exactly, and what was killed loses nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., "subprocess.Popen[str]"]
LONG = ("train", "minute.yaml", "steps=100", "checkpoint.every=2")


def steps_in(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    return [json.loads(x)["step"] for x in file.read_text().splitlines(keepends=True) if x.endswith("\n")] if (
        file.is_file()
    ) else []  # fmt: skip


def wait_for_steps(process: subprocess.Popen[str], run: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(steps_in(run)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step_with_a_checkpoint(number: int, start_epo: Start, epo: Callable[..., Any]):
    process, run = start_epo(*LONG), Path("runs/minute")
    wait_for_steps(process, run, 2)
    # Ctrl-C reaches every process of the terminal's foreground group; SIGTERM comes to the one that is named.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopping after this step" in err and "Traceback" not in err
    assert "--resume goes on" in out
    steps = steps_in(run)
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < 100
    newest = sorted(p.name for p in (run / "checkpoints").iterdir())[-1]
    assert newest == f"step_{len(steps):06d}"
    assert json.loads((run / "summary.json").read_text())["finished"] is False
    if number == signal.SIGTERM:
        return
    # The total is part of the configuration, so a changed one is refused and the run stays as it was.
    refused = epo(*LONG[:2], "steps=3", "checkpoint.every=2", "--resume")
    assert refused.code == 2 and "steps (100 then, 3 now)" in refused.err
    assert steps_in(run) == steps


def test_a_second_signal_ends_at_once(start_epo: Start):
    # Steps long enough that the second signal comes within the first one's step.
    process, run = start_epo(*LONG, "rollout.tasks_per_step=1000"), Path("runs/minute")
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step_000000").is_dir():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    # Two signals that a busy process sees at the same moment are one.
    while "once more to stop at once" not in process.stderr.readline():
        assert process.poll() is None
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    # The step would take minutes; a busy machine takes seconds to end a process and its workers.
    assert time.monotonic() - start < 30
    assert "interrupted" in err and "Traceback" not in err
    assert steps_in(run) == []


def test_a_killed_run_is_resumed_without_a_lost_or_repeated_step(start_epo: Start, epo: Callable[..., Any]):
    arguments, run = ("train", "minute.yaml", "steps=12", "checkpoint.every=3"), Path("runs/minute")
    process = start_epo(*arguments)
    wait_for_steps(process, run, 4)
    time.sleep(random.random() * 0.5)  # at any moment of a step, an update or a checkpoint
    process.kill()
    process.communicate()
    before = steps_in(run)
    assert before == list(range(1, len(before) + 1))
    resumed = epo(*arguments, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert json.loads(resumed.out)["finished"] is True
    assert steps_in(run) == list(range(1, 13))
    whole = epo(*arguments, "--name", "whole")
    assert whole.code == 0
    one, other = (
        [
            {
                k: v
                for k, v in json.loads(x).items()
                if not k.startswith(("time/", "memory/", "workers/")) and k != "tokens/per_second"
            }
            for x in (Path("runs") / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("minute", "whole")
    )
    assert one == other
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []
