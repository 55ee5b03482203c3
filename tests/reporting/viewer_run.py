"""Made-up run folders for tests of what shows trajectories: small, quick, always the same, without a model."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from epo.recipe import load_config
from epo.reporting.pages.report import write_report
from epo.reporting.reading.run_reader import read_run
from epo.reporting.trajectories import index_entry

ROOMS = ("kitchen", "living room", "bedroom", "bathroom", "garden")
GOALS = ("find-apple", "light-lamp", "water-plant")
OLD_KEYS = ("reward", "trained")
OLD_TURN_KEYS = ("advantages", "ratios", "alternatives", "dropped_turns", "prompt_tokens", "understood")


class Vocabulary:
    """Gives every piece of text an id, in order of appearance."""

    def __init__(self) -> None:
        self.pieces: list[str] = ["<|im_end|>"]

    def id_of(self, piece: str) -> int:
        if piece not in self.pieces:
            self.pieces.append(piece)
        return self.pieces.index(piece)

    def encode(self, text: str) -> list[int]:
        """Words with the space before them, signs and line feeds alone; the end of the turn last."""
        return [*map(self.id_of, re.findall(r" ?\w+|\s|[^\w\s]", text)), 0]


def turn_record(
    vocabulary: Vocabulary, rng: random.Random, *, observation: str, response: str, action: str, **changes: Any
) -> dict[str, Any]:
    """A turn whose tokens have entropies, log-probabilities, ratios and alternatives that fit together."""
    ids = vocabulary.encode(response)
    probabilities = [rng.choice((0.998, 0.97, 0.8, 0.5, 0.2, 0.04)) for _ in ids]
    return {
        "observation": observation,
        "response": response,
        "action": action,
        "is_valid": True,
        "understood": True,
        "reward": 0.0,
        "score": 0.0,
        "dropped_turns": 0,
        "prompt_tokens": 40 + 2 * len(observation),
        "response_ids": ids,
        "logprobs": [round(math.log(p), 5) for p in probabilities],
        "entropy": [round(-math.log(p) * rng.uniform(0.6, 1.4), 5) for p in probabilities],
        "advantages": [round(rng.gauss(0, 1), 5) for _ in ids],
        "ratios": [round(math.exp(rng.gauss(0, 0.2)), 5) for _ in ids],
        "alternatives": [
            [
                token,
                round(math.log(p), 5),
                other,
                round(math.log((1 - p) * 0.7), 5),
                0,
                round(math.log((1 - p) * 0.2), 5),
            ]
            for token, other, p in zip(ids, [*ids[1:], 1], probabilities, strict=True)
        ],
    } | changes


def trajectory(
    vocabulary: Vocabulary,
    rng: random.Random,
    *,
    step: int,
    group: int,
    task: int,
    member: int,
    turns: int | None = None,
) -> dict[str, Any]:
    """Walks from room to room until something is found, or not."""
    goal = GOALS[task % len(GOALS)]
    success = rng.random() < 0.5
    count = turns or rng.randint(2, 6)
    records: list[dict[str, Any]] = []
    for k in range(count):
        here, there = rng.sample(ROOMS, 2) if k else (ROOMS[0], ROOMS[1 + (member % 2)])
        is_last = k == count - 1
        action = "take apple" if is_last and success else f"go to {there}"
        records.append(
            turn_record(
                vocabulary,
                rng,
                observation=f"You are in the {here}.\nYou see:\n\ta door to the {there}  (open)\n\ta lamp",
                response=f"<think>The {there} may have it.</think>\n<action>{action}</action>",
                action=action,
                is_valid=not (member == 1 and k == 1),
                understood=not (member == 2 and k == 1),
                reward=1.0 if is_last and success else -0.1 if member == 1 and k == 1 else 0.0,
                score=1.0 if is_last and success else round(k / count / 2, 3),
            )
        )
    return {
        "step": step,
        "group": group,
        "task": f"{goal}/{task}",
        "goal": goal,
        "stop_reason": "success" if success else "max_turns",
        "success": success,
        "score": 1.0 if success else 0.4,
        "reward": round(sum(turn["reward"] for turn in records), 6),
        "error": None,
        "restarts": 0,
        "trained": True,
        "turns": records,
    }


def without_new_keys(record: Mapping[str, Any]) -> dict[str, Any]:
    """As an older version wrote it."""
    turns = [{k: v for k, v in turn.items() if k not in OLD_TURN_KEYS} for turn in record["turns"]]
    return {k: v for k, v in record.items() if k not in OLD_KEYS} | {"turns": turns}


def make_records(
    vocabulary: Vocabulary, *, step: int, groups: int = 3, members: int = 4, turns: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """The trajectories of one step."""
    rng = random.Random(1000 * seed + step)
    return [
        trajectory(vocabulary, rng, step=step, group=group, task=group + step % 2, member=member, turns=turns)
        for group in range(groups)
        for member in range(members)
    ]


def write_run(
    path: Path,
    steps: Mapping[int, Sequence[Mapping[str, Any]]],
    pieces: Sequence[str] | None,
    *overrides: str,
    with_index: bool = True,
) -> Path:
    """A finished run folder of these trajectories. `pieces=None`, `with_index=False`: as an older version left it."""
    config = load_config("base", [f"steps={max(steps)}", f"name={path.name}", "environment.suite=corridor", *overrides])
    (path / "trajectories").mkdir(parents=True)
    (path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (path / "provenance.json").write_text("{}", encoding="utf-8")
    (path / "summary.json").write_text('{"finished": true, "wall_seconds": 12.5}', encoding="utf-8")
    if pieces is not None:
        (path / "vocabulary.json").write_text(json.dumps(pieces), encoding="utf-8")
    metrics, index = [], []
    for step, records in sorted(steps.items()):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (path / "trajectories" / f"step_{step:06d}.jsonl").write_text(lines, encoding="utf-8")
        if with_index:
            index.append(index_entry(records))
        success = sum(record["success"] for record in records) / max(1, len(records))
        metrics.append({"step": step, "success/train": success, "reward/mean": success, "entropy/mean": 1.0 / step})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
    if with_index:
        lines = "".join(json.dumps(line) + "\n" for line in index)
        (path / "trajectories" / "index.jsonl").write_text(lines, encoding="utf-8")
    return path


@contextmanager
def without_plotly() -> Iterator[None]:
    """Pages made here have no Plotly inside: the viewer does not use it, and 4 MB less load faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plotly.offline.get_plotlyjs", lambda: "")
        yield


def write_viewer_report(path: Path, *runs: Path, steps: Sequence[int] | None = None) -> str:
    """A report of the runs, without Plotly. Returns its address."""
    with without_plotly():
        write_report(path, [read_run(run) for run in runs], steps=steps)
    return path.as_uri()
