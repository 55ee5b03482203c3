"""Which task groups a step is trained on: those whose attempts earned different rewards.

    starpo_s    a fixed share of the groups, those with the largest deviation
    snr         as many groups as hold a share of the deviation; groups without any are dropped

Both rank groups by the unbiased standard deviation of the total rewards inside the group (0 for a group of one), and
break ties by position, earlier groups first.

Legend for tensor suffixes: _G trajectories of one group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

ROUNDING = 1e-6
"""Relative size below which differences are taken for rounding, of float32 rewards too."""


def starpo_s(rewards: Sequence[Tensor], *, keep: float = 0.25) -> list[int]:
    """The `keep` share of the groups with the largest deviation of rewards (StarPO-S, arXiv 2504.20073).

    floor(keep * groups) of them, at least one. Groups without deviation fill up what is left, so a step whose groups
    all have equal rewards keeps its first groups. As in the authors' code, where the share is `int(value * groups)`.

    Args:
        rewards: one [G] per group: total rewards of its trajectories.
        keep: share of the groups, in (0, 1].

    Returns:
        Positions of the groups kept, in order.

    Raises:
        ValueError: `keep` out of its range, or an empty group.
    """
    _check_keep(keep)
    deviations = [_deviation(rewards_G) for rewards_G in rewards]
    count = max(1, math.floor(keep * len(deviations) * (1 + ROUNDING)))
    return sorted(_by_size(deviations)[:count])


def snr(rewards: Sequence[Tensor], *, keep: float = 0.9) -> list[int]:
    """The fewest groups that hold the `keep` share of the deviation of rewards (RAGEN-2, arXiv 2604.06268).

    Groups without deviation are dropped; a step that has no others keeps nothing.

    What is uncertain: the paper ranks by "reward variance". We follow the authors' code (its recommended "top-p
    linear" rule), which sums standard deviations, and leave out the 0.01 it takes off the threshold, which depends on
    the scale of the rewards. A sister project of theirs (VAGEN) sums variances, keeps everything when there is none,
    and scales advantages by the root of the share of groups kept.

    Args:
        rewards: one [G] per group: total rewards of its trajectories.
        keep: share of the summed deviation, in (0, 1].

    Returns:
        Positions of the groups kept, in order.

    Raises:
        ValueError: `keep` out of its range, or an empty group.
    """
    _check_keep(keep)
    deviations = [_deviation(rewards_G) for rewards_G in rewards]
    wanted = keep * math.fsum(deviations) * (1 - ROUNDING)
    kept: list[int] = []
    for position in _by_size(deviations):
        # Groups without deviation come last, and those before them hold all there is.
        if math.fsum(deviations[i] for i in kept) >= wanted:
            break
        kept.append(position)
    return sorted(kept)


def _deviation(rewards_G: Tensor) -> float:
    if len(rewards_G) == 0:
        raise ValueError("rewards must have one or more trajectories in every group, got an empty group")
    rewards_G = rewards_G.detach().double()
    size = float(rewards_G.abs().max())
    # Equal rewards that were summed up in different orders differ by rounding.
    if len(rewards_G) < 2 or float(rewards_G.max() - rewards_G.min()) <= ROUNDING * size:
        return 0.0
    return float(rewards_G.std())


def _by_size(deviations: Sequence[float]) -> list[int]:
    return sorted(range(len(deviations)), key=lambda position: -deviations[position])


def _check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep must lie in (0, 1], got {keep}")
