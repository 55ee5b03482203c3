"""Advantages without a critic: what a trajectory earned against what others earned.

    group_relative          GRPO and Dr. GRPO: over the mean of the group, the attempts at one task
    leave_one_out           RLOO: over the mean of the others in the group
    reinforce_plus_plus     REINFORCE++: return-to-go over the mean of the whole batch
    gigpo                   GiGPO: group_relative, and once more among turns that began in the same observation

Nothing here carries a gradient. A group of one, or of equal rewards, has advantages of exactly 0.

Legend for tensor suffixes: _G trajectories of one group, _N trained tokens of a batch, _T the turns they belong to,
_R rows: all turns of a batch, in any order.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby, pairwise
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

from epo.objectives.advantages import whiten

Key = TypeVar("Key", bound=Hashable)


def group_relative(rewards_G: Tensor, *, normalise_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Advantage of each trajectory over its group, the attempts at one task (GRPO, arXiv 2402.03300).

    A = (R - mean) / (std + eps) with the unbiased std; without `normalise_std`, A = R - mean (Dr. GRPO,
    arXiv 2503.20783). A group of one, or of equal rewards, teaches nothing: exactly 0.

    Args:
        rewards_G: [G] total rewards of the trajectories of one group. Given one reward per turn instead, the turns
            of the group are compared, and a trajectory weighs as much as it has turns.
        normalise_std: divide by the group's standard deviation.
        eps: added to it.

    Returns:
        [G] in a floating dtype.
    """
    rewards_G = _floating(rewards_G)
    # Rounding of the mean, divided by a std of nearly zero, would make up a signal out of equal rewards.
    if len(rewards_G) < 2 or bool(rewards_G.min() == rewards_G.max()):
        return torch.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    return centred_G / (rewards_G.std() + eps) if normalise_std else centred_G


def leave_one_out(rewards_G: Tensor) -> Tensor:
    """A_i = R_i minus the mean of the others in the group (RLOO, arXiv 2402.14740).

    This is G / (G - 1) times R_i - mean. A group of one has no others, and one of equal rewards no better ones:
    exactly 0.

    Args:
        rewards_G: [G] total rewards of the trajectories of one group.

    Returns:
        [G] in a floating dtype.
    """
    count = len(rewards_G)
    return group_relative(rewards_G, normalise_std=False) * (count / max(1, count - 1))


def reinforce_plus_plus(
    rewards_T: Tensor,
    trajectory_ids_N: Tensor,
    turn_ids_N: Tensor,
    *,
    gamma: float = 1.0,
    steps: Literal["token", "turn"] = "token",
    eps: float = 1e-8,
) -> Tensor:
    """Discounted return-to-go, whitened over all tokens of the batch (REINFORCE++, arXiv 2501.03262).

    G_s = r_s + gamma G_{s+1} along each trajectory, then A = (G - mean) / sqrt(var + eps) over tokens. A turn's reward
    is on its last token. The paper also takes a KL penalty per token off the rewards; here rewards are what they are
    given as. The paper's variant with a group baseline is `whiten` of the tokens' `group_relative` rewards.

    Args:
        rewards_T: [T] one per turn that has tokens, in the order of the tokens.
        trajectory_ids_N: [N] trajectories one after another.
        turn_ids_N: [N] non-decreasing inside a trajectory.
        gamma: discount per step, in [0, 1].
        steps: `token` discounts from token to token; `turn` from turn to turn, and the tokens of a turn share G.
        eps: added to the unbiased variance.

    Returns:
        [N] on the tokens' device, in the floating dtype of the rewards; all zero if all returns are equal.

    Raises:
        ValueError: lengths that do not fit, tokens out of order, or a number out of its range.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    if steps not in ("token", "turn"):
        raise ValueError(f"steps must be 'token' or 'turn', got {steps!r}")
    _same_length(trajectory_ids=trajectory_ids_N, turn_ids=turn_ids_N)
    rewards_T = _floating(rewards_T)
    trajectories, turns, lengths = _turns(trajectory_ids_N, turn_ids_N)
    if rewards_T.shape != (len(lengths),):
        raise ValueError(f"rewards must be one per turn with tokens: [{len(lengths)}], got {list(rewards_T.shape)}")
    if len(set(trajectories)) < sum(1 for _ in groupby(trajectories)):
        raise ValueError("trajectory_ids must be contiguous: give the tokens of one trajectory after another's")
    if any(a == b and s > t for (a, s), (b, t) in pairwise(zip(trajectories, turns, strict=True))):
        raise ValueError("turn_ids must not decrease inside a trajectory")
    # Plain floats: far faster than tensors of one element.
    returns: list[float] = []
    last_trajectory, following = None, 0.0
    for trajectory, reward, length in zip(
        reversed(trajectories), reversed(_floats(rewards_T)), reversed(lengths), strict=True
    ):
        value = reward + (gamma * following if trajectory == last_trajectory else 0.0)
        returns += [value * (gamma**i if steps == "token" else 1.0) for i in range(length)]
        last_trajectory, following = trajectory, returns[-1]
    returns_N = torch.tensor(returns[::-1], dtype=rewards_T.dtype, device=trajectory_ids_N.device)
    return whiten(returns_N, eps=eps)


def discounted_returns(rewards_S: Tensor, *, gamma: float = 1.0) -> Tensor:
    """G_s = r_s + gamma G_{s+1} along one sequence.

    Args:
        rewards_S: [S] reward received after each step.
        gamma: discount per step, in [0, 1].

    Returns:
        [S] in a floating dtype.

    Raises:
        ValueError: `gamma` out of its range.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    rewards_S = _floating(rewards_S)
    returns: list[float] = []
    following = 0.0
    for reward in reversed(_floats(rewards_S)):
        following = reward + gamma * following
        returns.append(following)
    return torch.tensor(returns[::-1], dtype=rewards_S.dtype, device=rewards_S.device)


def gigpo(
    episode_rewards_R: Tensor,
    returns_R: Tensor,
    trajectory_ids_R: Tensor,
    group_ids_R: Tensor,
    anchor_ids_R: Tensor,
    *,
    weight: float = 1.0,
    normalise_std: bool = False,
    statistics: Literal["trajectory", "row"] = "trajectory",
    eps: float = 1e-6,
) -> Tensor:
    """Group-in-group advantages of turns (GiGPO, arXiv 2505.10978, equations 3 and 6 to 8).

    A = A_episode + weight * A_step. A_episode compares whole episodes inside their group, as `group_relative`. A_step
    compares returns-to-go among the turns of the group that began in the same observation, the anchor state: what
    was done there differs, what it was done in does not. A turn whose observation nobody else in the group met has
    A_step = 0.

    Args:
        episode_rewards_R: [R] what the turn's whole episode earned.
        returns_R: [R] discounted return from the turn on (`discounted_returns`; the authors' scripts use 0.95).
        trajectory_ids_R: [R] trajectory of the turn.
        group_ids_R: [R] group of its trajectory. Nothing is compared across groups.
        anchor_ids_R: [R] equal for turns of a group that began in the same observation.
        weight: of A_step, >= 0.
        normalise_std: divide both by their standard deviation + eps, else by 1. The authors' code knows both.
        statistics: A_episode's mean and deviation are over the group's `trajectory`s, each counted once, or over its
            `row`s (turns), as the authors' code does by default; then rewards may differ inside an episode.
        eps: added to the deviations.

    Returns:
        [R] in a floating dtype.

    Raises:
        ValueError: lengths differ, a trajectory lies in two groups, episode rewards differ inside a trajectory though
            `statistics` is `trajectory`, or a number out of its range.
    """
    if weight < 0:
        raise ValueError(f"weight must be >= 0, got {weight}")
    if statistics not in ("trajectory", "row"):
        raise ValueError(f"statistics must be 'trajectory' or 'row', got {statistics!r}")
    _same_length(
        episode_rewards=episode_rewards_R,
        returns=returns_R,
        trajectory_ids=trajectory_ids_R,
        group_ids=group_ids_R,
        anchor_ids=anchor_ids_R,
    )
    rewards_R, returns_R = _floating(episode_rewards_R), _floating(returns_R)
    if len(rewards_R) == 0:
        return rewards_R
    trajectories, groups, anchors = _ints(trajectory_ids_R), _ints(group_ids_R), _ints(anchor_ids_R)
    group_of = dict(zip(trajectories, groups, strict=True))
    if any(group_of[trajectory] != group for trajectory, group in zip(trajectories, groups, strict=True)):
        raise ValueError("group_ids must be equal inside a trajectory")
    if statistics == "row":
        episode_R = _relative(rewards_R, groups, normalise_std=normalise_std, eps=eps)
    else:
        rows = _positions(trajectories)
        rewards_B = rewards_R[[first for first, *_ in rows.values()]]
        episode_B = _relative(rewards_B, [group_of[t] for t in rows], normalise_std=normalise_std, eps=eps)
        number = {trajectory: i for i, trajectory in enumerate(rows)}
        index_R = [number[trajectory] for trajectory in trajectories]
        if bool((rewards_R != rewards_B[index_R]).any()):
            raise ValueError("episode_rewards must be equal inside a trajectory if statistics is 'trajectory'")
        episode_R = episode_B[index_R]
    meetings = list(zip(groups, anchors, strict=True))
    return episode_R + weight * _relative(returns_R, meetings, normalise_std=normalise_std, eps=eps)


def _relative(values_R: Tensor, keys: Sequence[Hashable], *, normalise_std: bool, eps: float) -> Tensor:
    """`group_relative` inside each set of rows of equal keys."""
    result_R = torch.empty_like(values_R)
    for rows in _positions(keys).values():
        result_R[rows] = group_relative(values_R[rows], normalise_std=normalise_std, eps=eps)
    return result_R


def _positions(keys: Sequence[Key]) -> dict[Key, list[int]]:
    found: dict[Key, list[int]] = {}
    for position, key in enumerate(keys):
        found.setdefault(key, []).append(position)
    return found


def _turns(trajectory_ids_N: Tensor, turn_ids_N: Tensor) -> tuple[list[int], list[int], list[int]]:
    """Trajectory, turn and number of tokens of every run of tokens of one turn."""
    keys = zip(_ints(trajectory_ids_N), _ints(turn_ids_N), strict=True)
    runs = [(key, len(list(tokens))) for key, tokens in groupby(keys)]
    return [key[0] for key, _ in runs], [key[1] for key, _ in runs], [length for _, length in runs]


def _same_length(**tensors: Tensor) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError("all must be flat and equally long, got " + ", ".join(f"{n} {s}" for n, s in shapes.items()))


def _floating(values: Tensor) -> Tensor:
    values = values.detach()
    return values if values.is_floating_point() else values.to(torch.float32)


def _floats(values: Tensor) -> list[float]:
    return cast("list[float]", values.double().tolist())  # pyright: ignore[reportUnknownMemberType]


def _ints(values: Tensor) -> list[int]:
    return cast("list[int]", values.tolist())  # pyright: ignore[reportUnknownMemberType]
