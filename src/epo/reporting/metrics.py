"""What a step's trajectories look like in numbers. Names are stable and documented in `docs/metrics.md`.

Legend: K turns of a trajectory.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

from epo.packing import extends
from epo.types import StopReason, Trajectory, TrajectoryGroup


def rollout_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """Metrics of one step's rollouts. Shares and means are over trajectories unless the name says otherwise."""
    trajectories = [t for group in groups for t in group.trajectories]
    turns = [turn for t in trajectories for turn in t.turns]
    count = max(1, len(trajectories))
    metrics = {
        "reward/mean": sum(t.total_reward for t in trajectories) / count,
        "success/train": sum(t.success for t in trajectories) / count,
        "score/train": sum(t.score for t in trajectories) / count,
        "turns/mean": len(turns) / count,
        "turns/invalid": sum(not turn.is_valid for turn in turns) / max(1, len(turns)),
        "turns/not_understood": sum(not turn.understood for turn in turns) / max(1, len(turns)),
        "response/tokens": sum(len(turn.response_ids) for turn in turns) / max(1, len(turns)),
        "groups/all_equal": _all_equal(groups),
        "episodes": float(len(trajectories)),
        "episodes/restarts": float(sum(t.restarts for t in trajectories)),
    }
    metrics |= {
        "context/segments": sum(map(_segments, trajectories)) / count,
        "context/dropped_turns": sum(max((k.dropped_turns for k in t.turns), default=0) for t in trajectories) / count,
        "context/drift": sum(turn.drifted for turn in turns) / max(1, len(turns)),
    }
    for reason in StopReason:
        metrics[f"stop/{reason.value}"] = sum(t.stop_reason is reason for t in trajectories) / count
    # As in the entropy history: episodes that an environment error ended are no part of the policy's record.
    return metrics | entropy_metrics([t for group in groups for t in group.survivors])


def entropy_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean entropy over sampled tokens, and over the first and the last third of the turns actually played.

    Every trajectory of at least two turns weighs the same in `turn_early` and `turn_late`; a third has at least one
    turn. What nothing was sampled for is absent.
    """
    tokens = [float(h) for t in trajectories for turn in t.turns for h in turn.entropy]
    early: list[float] = []
    late: list[float] = []
    for trajectory in trajectories:
        per_turn_K = [float(turn.entropy.mean()) for turn in trajectory.turns if len(turn.entropy)]
        if len(per_turn_K) >= 2:
            third = max(1, len(per_turn_K) // 3)
            early.append(statistics.fmean(per_turn_K[:third]))
            late.append(statistics.fmean(per_turn_K[-third:]))
    metrics = {"entropy/mean": statistics.fmean(tokens)} if tokens else {}
    if early:
        metrics |= {"entropy/turn_early": statistics.fmean(early), "entropy/turn_late": statistics.fmean(late)}
    return metrics


def entropy_oscillation(entropy_by_step: Sequence[float], *, window: int = 10) -> float:
    """Standard deviation of the step-to-step change of the mean entropy over the last `window` changes."""
    recent = list(entropy_by_step[-window - 1 :])
    changes = [b - a for a, b in pairwise(recent)]
    return statistics.pstdev(changes) if len(changes) >= 2 else 0.0


def _segments(trajectory: Trajectory) -> int:
    """Runs of turns each of which reads what the one before read and wrote: the training rows of the trajectory."""
    turns = trajectory.turns
    return (1 if turns else 0) + sum(not extends(after, before) for before, after in pairwise(turns))


def _all_equal(groups: Sequence[TrajectoryGroup]) -> float:
    """Share of groups of two or more whose rewards are all the same: they teach a group-relative method nothing."""
    groups = [g for g in groups if len(g.survivors) >= 2]
    equal = sum(len({t.total_reward for t in g.survivors}) == 1 for g in groups)
    return equal / len(groups) if groups else 0.0
