"""What a step's trajectories look like in numbers. Names are stable and documented in `docs/metrics.md`.

Legend: K turns of a trajectory, R tokens of a response.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

from epo.packing import extends
from epo.types import StopReason, Trajectory, TrajectoryGroup, Turn


def rollout_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """Metrics of one step's rollouts. Shares and means are over trajectories unless the name says otherwise."""
    trajectories = [t for group in groups for t in group.trajectories]
    turns = [turn for t in trajectories for turn in t.turns]
    count = max(1, len(trajectories))
    metrics = {
        "reward/mean": sum(t.total_reward for t in trajectories) / count,
        "reward/std": reward_std(groups),
        "success/train": sum(t.success for t in trajectories) / count,
        "score/train": sum(t.score for t in trajectories) / count,
        "turns/mean": len(turns) / count,
        "turns/invalid": sum(not turn.is_valid for turn in turns) / max(1, len(turns)),
        "turns/not_understood": sum(not turn.understood for turn in turns) / max(1, len(turns)),
        "turns/repeated": _repeated_turns(trajectories),
        "response/tokens": sum(len(turn.response_ids) for turn in turns) / max(1, len(turns)),
        "response/tokens_max": float(max((len(turn.response_ids) for turn in turns), default=0)),
        "response/repetition": _repetition(turns),
        "groups/all_equal": _all_equal(groups),
        "episodes": float(len(trajectories)),
        "episodes/restarts": float(sum(t.restarts for t in trajectories)),
    }
    metrics |= {
        "context/segments": sum(map(_segments, trajectories)) / count,
        "context/dropped_turns": sum(max((k.dropped_turns for k in t.turns), default=0) for t in trajectories) / count,
        "context/drift": sum(turn.drifted for turn in turns) / max(1, len(turns)),
    }
    # Of nothing there is no mean: a step that the environments lost says nothing of the policy.
    survivors = [t for group in groups for t in group.survivors]
    if not turns:
        metrics = {name: value for name, value in metrics.items() if name not in _OF_TURNS}
    if not survivors:
        del metrics["reward/std"]
    for reason in StopReason:
        if reason is not StopReason.SERVER_ERROR:
            metrics[f"stop/{reason.value}"] = sum(t.stop_reason is reason for t in trajectories) / count
    # As in the entropy history: episodes that an environment error ended are no part of the policy's record.
    return metrics | entropy_metrics(survivors)


_OF_TURNS = (
    *("turns/invalid", "turns/not_understood", "turns/repeated", "context/drift"),
    *("response/tokens", "response/tokens_max", "response/repetition"),
)


def entropy_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean entropy over sampled tokens, over those of thoughts and of actions where responses have such parts, and over
    the first and the last third of the turns actually played.

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
    parted = [(turn.entropy, turn.parts) for t in trajectories for turn in t.turns if turn.parts is not None]
    for part, spans in (
        ("think", [(entropy_R, parts.thought) for entropy_R, parts in parted]),
        ("action", [(entropy_R, parts.action) for entropy_R, parts in parted]),
    ):
        inside = [float(h) for entropy_R, span in spans if span is not None for h in entropy_R[slice(*span)]]
        if inside:
            metrics[f"entropy/{part}"] = statistics.fmean(inside)
    if early:
        metrics |= {"entropy/turn_early": statistics.fmean(early), "entropy/turn_late": statistics.fmean(late)}
    return metrics


def entropy_oscillation(entropy_by_step: Sequence[float], *, window: int = 10) -> float:
    """Standard deviation of the step-to-step change of the mean entropy over the last `window` changes."""
    recent = list(entropy_by_step[-window - 1 :])
    changes = [b - a for a, b in pairwise(recent)]
    return statistics.pstdev(changes) if len(changes) >= 2 else 0.0


def reward_std(groups: Sequence[TrajectoryGroup]) -> float:
    """Standard deviation of the rewards that are trained on: inside a task group, mean over the groups of two or more;
    over the whole step where there are none. 0 where there is nothing to compare."""
    rewards = [[t.total_reward for t in group.survivors] for group in groups]
    compared = [group for group in rewards if len(group) >= 2] or [[reward for group in rewards for reward in group]]
    return statistics.fmean(statistics.pstdev(group) if group else 0.0 for group in compared)


def repetition(token_ids: Sequence[int], *, size: int = 4) -> float:
    """Share of the n-grams of a text that occurred in it before: 1 - distinct / all. Known as seq-rep-4.

    Welleck et al., Neural Text Generation with Unlikelihood Training, arXiv 1908.04319. 0 for a text without n-grams.
    """
    ids = [int(i) for i in token_ids]
    grams = list(zip(*(ids[k:] for k in range(size)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _repetition(turns: Sequence[Turn], *, size: int = 4) -> float:
    """Mean over the responses that are long enough to repeat one n-gram."""
    found = [repetition(turn.response_ids.tolist()) for turn in turns if len(turn.response_ids) > size]
    return statistics.fmean(found) if found else 0.0


def _repeated_turns(trajectories: Sequence[Trajectory]) -> float:
    """Share of turns after the first that try the action before again, although it left the observation as it was."""
    pairs = [pair for t in trajectories for pair in pairwise(t.turns)]
    again = sum(a.action == b.action and a.observation == b.observation for a, b in pairs)
    return again / max(1, len(pairs))


def _segments(trajectory: Trajectory) -> int:
    """Runs of turns each of which reads what the one before read and wrote: the training rows of the trajectory."""
    turns = trajectory.turns
    return (1 if turns else 0) + sum(not extends(after, before) for before, after in pairwise(turns))


def _all_equal(groups: Sequence[TrajectoryGroup]) -> float:
    """Share of groups of two or more whose rewards are all the same: they teach a group-relative method nothing."""
    groups = [g for g in groups if len(g.survivors) >= 2]
    equal = sum(len({t.total_reward for t in g.survivors}) == 1 for g in groups)
    return equal / len(groups) if groups else 0.0
