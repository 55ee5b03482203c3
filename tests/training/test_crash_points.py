"""Death at every single file-system call of what a run writes: what is there afterwards is whole, and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint_damage import make_learner

from epo.config import Config, ModelConfig
from epo.training.checkpoint import checkpoints, read_state, save_checkpoint
from epo.training.run_folder import RunFolder

CALLS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


@pytest.fixture(autouse=True)
def _no_power_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing is slow, and matters only when the machine dies: a killed process loses nothing of what it wrote."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def dies_at(number: int, work: Callable[[], object]) -> bool:
    """Do `work` in a forked process that is killed at its file-system call `number`; False if it ended before."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            count = 0

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                nonlocal count
                if event in CALLS:
                    count += 1
                    if count == number:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            work()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_a_checkpoint_is_whole_or_not_there_wherever_its_writer_dies(
    minute_config: Callable[..., Config], tiny_config: ModelConfig, tokenizer: Any, tmp_path: Path
):
    """`keep=2` with two there already, so that an old one is dropped too."""
    learner = make_learner(minute_config("algorithm.name=ppo"), tiny_config, tokenizer)
    base = tmp_path / "base"
    for step in (1, 2):
        save_checkpoint(base, learner, step=step, state={"step": step}, keep=2)
    number, seen = 0, set()
    while True:
        number += 1
        folder = tmp_path / str(number)
        shutil.copytree(base, folder, copy_function=os.link)
        died = dies_at(number, lambda: save_checkpoint(folder, learner, step=3, state={"step": 3}, keep=2))  # noqa: B023
        left = [read_state(path)["step"] for path in checkpoints(folder)]
        seen.add(tuple(left))
        assert left in ([1, 2], [1, 2, 3], [2, 3])
        run = RunFolder(tmp_path)
        run.checkpoints = folder
        run.rewind(0, evaluations=[])
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
        if not died:
            break
    assert number > 40 and seen == {(1, 2), (1, 2, 3), (2, 3)} and left == [2, 3]


def lines(file: Path) -> list[int]:
    return [json.loads(x)["step"] for x in file.read_text().splitlines()] if file.is_file() else []


def test_a_step_or_a_rewind_that_dies_anywhere_is_made_good_by_the_next(tmp_path: Path):
    number = 0
    both_ended = False
    while not both_ended:
        number += 1
        path = tmp_path / str(number)
        path.mkdir()
        run = RunFolder(path)
        for step in (1, 2, 3):
            run.add_step(step, {"reward/mean": float(step)}, [])
            run.add_evaluation({"step": step, "panels": []})
        (path / "summary.json").write_text("{}")
        (path / "skipped" / "step_000003_minibatch_0").mkdir(parents=True)
        (path / "skipped" / "step_000002_minibatch_0").mkdir(parents=True)
        died = dies_at(number, lambda: run.add_step(4, {"reward/mean": 4.0}, []))  # noqa: B023
        with (path / "metrics.jsonl").open("a") as file:  # as of a machine that lost power in the write
            file.write('{"step": 5, "rew')

        def rewind() -> None:
            run.rewind(2, evaluations=[{"step": 2, "panels": []}])  # noqa: B023

        died_again = dies_at(number, rewind)
        rewind()
        assert lines(run.metrics_file) == [1, 2] and lines(run.evaluations_file) == [2]
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if "skipped/" in str(p) or p.is_file())
        assert names == [
            *("eval.jsonl", "metrics.jsonl", "skipped/step_000002_minibatch_0", "trajectories/index.jsonl"),
            *("trajectories/step_000001.jsonl", "trajectories/step_000002.jsonl"),
        ]
        run.add_step(3, {"reward/mean": 3.0}, [])
        assert lines(run.metrics_file) == [1, 2, 3]
        both_ended = not died and not died_again
    assert number > 10


@pytest.mark.parametrize("damage", ["gap", "twice", "no JSON", "gone"])
def test_a_lost_step_is_named_with_the_way_to_play_it_again(tmp_path: Path, damage: str):
    run = RunFolder(tmp_path)
    for step in range(1, 6):
        run.add_step(step, {}, [])
    run.require_steps(5)
    run.require_steps(2)
    text = run.metrics_file.read_text().splitlines(keepends=True)
    text[2] = {"gap": "", "twice": text[1], "no JSON": "\0" * 20 + "\n", "gone": text[2]}[damage]
    run.metrics_file.write_text("".join(text))
    if damage == "gone":
        run.metrics_file.unlink()
    first = {"gone": 1, "twice": 2}.get(damage, 3)
    with pytest.raises(ValueError, match=f"lacks step {first} .*delete the checkpoints after step {first - 1}"):
        run.require_steps(5)
    run.require_steps(first - 1)
