"""Real processes: a sweep finishes what was killed, repeats nothing that is finished, and leaves nothing running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epo.errors import UserError
from epo.sweep.folder import SweepFolder
from epo.sweep.plan import load_sweep

Start = Callable[..., "subprocess.Popen[str]"]
FOLDER = Path("sweeps/two")
RUNS = ["plain--seed0", "bonus--seed0", "plain--seed1", "bonus--seed1"]


def lines(file: Path) -> list[dict[str, Any]]:
    text = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in text if line.endswith("\n")]


def steps(run: str) -> list[int]:
    return [line["step"] for line in lines(FOLDER / run / "metrics.jsonl")]


def outcome(run: str, folder: Path) -> list[dict[str, Any]]:
    """Everything measured, without what the machine decides."""
    return [
        {
            k: v
            for k, v in line.items()
            if not k.startswith(("time/", "memory/", "workers/")) and k != "tokens/per_second"
        }
        for name in ("metrics.jsonl", "eval.jsonl")
        for line in lines(folder / run / name)
    ]


def states(result: Any) -> dict[str, str]:
    return {run["name"]: run["state"] for run in json.loads(result.out)["runs"]}


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def set_steps(count: int) -> None:
    Path("two.yaml").write_text(Path("two.yaml").read_text() + f"set: {{steps: {count}, checkpoint.every: 2}}\n")


def processes_in(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        try:
            if str(folder).encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


@pytest.mark.timeout(900)  # a dozen processes, each with torch to import
def test_killed_and_run_again_it_ends_as_if_nothing_had_happened(epo: Callable[..., Any], start_epo: Start) -> None:
    set_steps(8)
    # Absolute, so that the processes of this test can be told from all others.
    arguments = ("sweep", "two.yaml", "--sweeps", str(Path("sweeps").absolute()))
    process = start_epo(*arguments, "--parallel", "1")
    wait_for(lambda: len(steps(RUNS[1])) >= 3, process)
    process.kill()
    process.wait()
    [left] = processes_in(FOLDER.absolute())  # the sweep is gone, the run it had started is not
    os.kill(left, signal.SIGSTOP)
    refused = epo(*arguments)
    assert refused.code == 2 and "is at work in" in refused.err
    os.kill(left, signal.SIGKILL)
    finished_before = (FOLDER / RUNS[0] / "metrics.jsonl").stat().st_mtime_ns

    # A process that was killed needs a moment to let go of the lock.
    deadline = time.monotonic() + 30
    while (again := epo(*arguments, "--json")).code == 2 and time.monotonic() < deadline:
        assert "is at work in" in again.err
    assert again.code == 0, again.err
    assert states(again) == dict.fromkeys(RUNS, "finished")
    assert f"{RUNS[0]}: was finished before" in again.err and f"{RUNS[1]}: goes on" in again.err
    assert (FOLDER / RUNS[0] / "metrics.jsonl").stat().st_mtime_ns == finished_before
    for run in RUNS:
        assert steps(run) == list(range(1, 9))
    whole = epo("train", str(FOLDER / "arms" / "bonus.yaml"), "seed=0", "--name", "whole")
    assert whole.code == 0, whole.err
    assert outcome(RUNS[1], FOLDER) == outcome("whole", Path("runs"))


def test_a_sweep_may_grow_but_not_change() -> None:
    text, folder, file = Path("two.yaml").read_text(), SweepFolder(FOLDER), Path("two.yaml")
    with folder.locked():
        folder.prepare(load_sweep(file))
    before = (FOLDER / "arms" / "bonus.yaml").read_text()
    file.write_text(text.replace("0.01", "0.02").replace("[0, 1]", "[0, 1, 2]"))
    with folder.locked(), pytest.raises(UserError, match=r"'bonus'.*entropy.coefficient \(0.01 then, 0.02 now\)"):
        folder.prepare(load_sweep(file))
    assert (FOLDER / "arms" / "bonus.yaml").read_text() == before
    assert "seeds:\n- 0\n- 1\narms" in (FOLDER / "sweep.yaml").read_text().replace("set: {}\n", "")
    file.write_text(text.replace("[0, 1]", "[5, 0]") + "  third: {entropy: {method: epo}}\n")
    with folder.locked():
        folder.prepare(load_sweep(file))
    assert sorted(path.name for path in (FOLDER / "arms").iterdir()) == ["bonus.yaml", "plain.yaml", "third.yaml"]


def test_a_folder_that_is_no_sweep_is_left_alone() -> None:
    Path("other").mkdir()
    (Path("other") / "file").write_text("mine")
    with pytest.raises(UserError, match="is no sweep"), SweepFolder(Path("other")).locked():
        pass
    assert [path.name for path in Path("other").iterdir()] == ["file"]


def test_nothing_is_written_by_a_dry_run(epo: Callable[..., Any]) -> None:
    result = epo("sweep", "two.yaml", "--dry-run")
    assert result.code == 0 and all(run in result.out for run in RUNS) and "4 runs" in result.out
    assert not Path("sweeps").exists()
    too_many = epo("sweep", "two.yaml", "--parallel", "4096", "--dry-run")
    assert too_many.code == 2 and "--parallel 4096" in too_many.err
