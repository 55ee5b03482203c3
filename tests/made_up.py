"""Made-up trajectories: whole transcripts of random tokens, with sampling statistics of any policy one likes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from epo.types import StopReason, Task, Trajectory, TrajectoryGroup, Turn

VOCABULARY = 300


def trajectory(
    rng: np.random.Generator,
    *,
    turns: int,
    task: str = "a",
    rewards: Sequence[float] | None = None,
    splits_at: int | None = None,
) -> Trajectory:
    """`turns` turns of one to five tokens; turn `splits_at` starts a prompt of its own, as a window context would."""

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, size=rng.integers(low, high + 1))

    made = Trajectory(task=Task(suite="made-up", id=task, split="train"), stop_reason=StopReason.FAILURE)
    prompt = tokens(4, 9)
    for number in range(turns):
        if number == splits_at:
            prompt = tokens(4, 9)
        response = tokens(1, 5)
        made.turns.append(
            Turn(
                prompt_ids=prompt,
                response_ids=response,
                logprobs=rng.uniform(-7, -4, size=len(response)).astype(np.float32),
                # Different from turn to turn, so that a reference per turn is not the scalar one.
                entropy=((1 + number) * rng.uniform(0.1, 0.9, size=len(response))).astype(np.float32),
                observation="",
                response="",
                action="",
                is_valid=True,
                environment_reward=float(rng.normal() if rewards is None else rewards[number]),
            )
        )
        prompt = np.concatenate([prompt, response, tokens(2, 4)])
    return made


def groups(rng: np.random.Generator, *, count: int = 3, size: int = 2) -> list[TrajectoryGroup]:
    """Groups of trajectories of different lengths; one of them splits into two rows."""
    found = []
    for g in range(count):
        members = [
            trajectory(rng, turns=int(rng.integers(1, 5)), task=f"task{g}", splits_at=1 if g == 0 else None)
            for _ in range(size)
        ]
        found.append(TrajectoryGroup(task=members[0].task, trajectories=members))
    return found
