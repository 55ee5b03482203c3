"""What is written of a step: strict JSON that says what the trajectories say, and an index that agrees with it."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from epo.recipe import load_config
from epo.reporting.trajectories import index_entry, trajectory_record
from epo.training.run_folder import RunFolder, read_lines
from epo.types import Alternatives, StopReason, Task, Trajectory, TrajectoryGroup, Turn


def turn(entropy: list[float], *, reward: float = 0.0, is_valid: bool = True, trained: bool = True) -> Turn:
    count = len(entropy)
    return Turn(
        prompt_ids=np.arange(5),
        response_ids=np.arange(count) + 10,
        logprobs=np.full(count, -0.25, dtype=np.float32),
        entropy=np.array(entropy, dtype=np.float32),
        alternatives=Alternatives(
            np.array([[3, 4]] * count).reshape(count, 2), np.array([[-0.5, -1.0]] * count, dtype=np.float32)
        ),
        advantages=np.full(count, 1.5, dtype=np.float32) if trained else None,
        ratios=np.full(count, 0.9, dtype=np.float32) if trained else None,
        observation="a <b>room</b>",
        response="go",
        action="go",
        is_valid=is_valid,
        environment_reward=reward,
    )


def trajectory(*turns: Turn, success: bool = False) -> Trajectory:
    task = Task(suite="s", id="t/1", split="train", goal="t")
    return Trajectory(task=task, turns=list(turns), success=success, stop_reason=StopReason.MAX_TURNS)


def test_a_record_is_strict_json_and_keeps_what_is_known_of_every_token():
    record = trajectory_record(trajectory(turn([0.1, float("nan")]), turn([], trained=False)), step=3, group=1)
    again = json.loads(json.dumps(record, allow_nan=False))
    assert (again["step"], again["group"], again["task"], again["trained"]) == (3, 1, "t/1", True)
    first, second = again["turns"]
    assert first["response_ids"] == [10, 11] and first["entropy"] == [0.1, None]
    assert first["alternatives"] == [[3, -0.5, 4, -1.0]] * 2
    assert first["advantages"] == [1.5, 1.5] and first["ratios"] == [0.9, 0.9]
    assert second["advantages"] is None and second["response_ids"] == [] and second["alternatives"] == []


def test_the_index_counts_each_trajectory_alike_at_every_turn():
    records = [
        trajectory_record(trajectory(turn([1.0, 3.0], reward=0.5), turn([7.0], is_valid=False)), step=2, group=0),
        trajectory_record(trajectory(turn([4.0, 4.0, 4.0, 4.0]), success=True), step=2, group=0),
        trajectory_record(trajectory(), step=2, group=1),
    ]
    entry = index_entry(records)
    assert entry["step"] == 2
    assert entry["turn_entropy"] == pytest.approx([statistics.fmean([2.0, 4.0]), 7.0])
    assert entry["turn_count"] == [2, 1]
    columns = entry["columns"]
    assert columns["group"] == [0, 0, 1] and columns["success"] == [False, True, False]
    assert columns["turns"] == [2, 1, 0] and columns["invalid"] == [1, 0, 0] and columns["tokens"] == [3, 4, 0]
    assert columns["reward"] == [0.5, 0.0, 0.0] and columns["stop_reason"] == ["max_turns"] * 3
    assert columns["entropy"][:2] == pytest.approx([11 / 3, 4.0], abs=1e-5) and columns["entropy"][2] is None


def test_the_index_of_unknown_entropies_is_null_not_zero():
    entry = index_entry([trajectory_record(trajectory(turn([float("nan")])), step=1, group=0)])
    assert entry["turn_entropy"] == [None] and entry["columns"]["entropy"] == [None]


def test_a_step_is_kept_whatever_characters_an_environment_sends(tmp_path: Path):
    texts = ["café 厨房 🚪", "\ud83d alone", "\x1b[2J\x00\u2028"]
    found = trajectory(*(replace(turn([0.5]), observation=text) for text in texts))
    run = RunFolder.create(tmp_path / "run", load_config("base"), {})
    run.add_step(1, {"reward/mean": 0.0}, [TrajectoryGroup(task=found.task, trajectories=[found])])
    raw = (run.trajectories / "step_000001.jsonl").read_bytes()
    (line,) = raw.decode("utf-8").split("\n")[:-1]
    assert [t["observation"] for t in json.loads(line)["turns"]] == texts
    assert read_lines(run.index_file)[0]["columns"]["turns"] == [3]
