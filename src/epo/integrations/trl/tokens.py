"""Which token of TRL's padded rows belongs to which turn, and what the tokens of all rows say together.

Legend for tensor suffixes: _B rows (trajectories), _T positions of the completion, _N trained tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epo.objectives import trajectory_mean


def turn_ids(mask_B_T: Tensor) -> Tensor:
    """The turn of each trained token, -1 elsewhere: every run of trained tokens is a turn.

    Between two responses TRL always has tokens that the model did not write, at least those of the chat template. A
    `rollout_func` whose `env_mask` joins two responses makes one turn of them.

    Args:
        mask_B_T: [B, T] 1 for the tokens that the model wrote, 0 for observations and padding.

    Returns:
        [B, T] int64.
    """
    is_trained_B_T = mask_B_T.bool()
    before_B_T = torch.nn.functional.pad(is_trained_B_T, (1, 0))[:, :-1]
    return torch.where(is_trained_B_T, (is_trained_B_T & ~before_B_T).cumsum(dim=1) - 1, -1)


def turn_metrics(entropy_N: Tensor, trajectory_ids_N: Tensor, turn_ids_N: Tensor) -> dict[str, float]:
    """`entropy/mean`, and `entropy/turn_early`, `entropy/turn_late` as docs/metrics.md defines them.

    Args:
        entropy_N: [N] nats, under the sampling policy.
        trajectory_ids_N: [N] integers >= 0.
        turn_ids_N: [N] integers >= 0, without gaps inside a trajectory.

    Returns:
        What there are tokens for: nothing for none, the mean alone where no trajectory has two turns.
    """
    if entropy_N.numel() == 0:
        return {}
    entropy_N = entropy_N.double()
    last_B = turn_ids_N.new_zeros(int(trajectory_ids_N.max()) + 1)
    turns_N = last_B.scatter_reduce(0, trajectory_ids_N, turn_ids_N, "amax")[trajectory_ids_N] + 1
    third_N = (turns_N // 3).clamp(min=1)
    metrics = {"entropy/mean": float(entropy_N.mean())}
    for name, part_N in (
        ("entropy/turn_early", (turns_N > 1) & (turn_ids_N < third_N)),
        ("entropy/turn_late", (turns_N > 1) & (turn_ids_N >= turns_N - third_N)),
    ):
        if part_N.any():
            metrics[name] = float(trajectory_mean(entropy_N[part_N], trajectory_ids_N[part_N], turn_ids_N[part_N]))
    return metrics
