"""Who gets the credit: advantages and returns of every trained token of a step.

Legend: N trained tokens of the step, n of one trajectory, K turns of one trajectory, G trajectories of one group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from epo.config import AlgorithmConfig
from epo.objectives import (
    Advantages,
    bilevel_gae,
    group_relative,
    trajectory_gae,
    turn_gae,
    whiten,
    within_turn_gae,
)
from epo.training.batch import TokenData
from epo.types import Trajectory


def ppo_advantages(
    trajectories: Sequence[Trajectory], data: TokenData, values_N: Tensor, config: AlgorithmConfig
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets [N] from the critic's `values_N`, each trajectory on its own, then whitened."""
    advantages_N, returns_N = torch.zeros_like(values_N), torch.zeros_like(values_N)
    for trajectory_id, trajectory in enumerate(trajectories):
        mask_N = data.trajectory_ids_N == trajectory_id
        advantages_N[mask_N], returns_N[mask_N] = _estimate(
            trajectory, values_N[mask_N], data.turn_ids_N[mask_N], config
        )
    return whiten(advantages_N) if config.whiten else advantages_N, returns_N


def _estimate(trajectory: Trajectory, values_n: Tensor, turn_ids_n: Tensor, config: AlgorithmConfig) -> Advantages:
    rewards_K = [turn.reward for turn in trajectory.turns]
    gamma, lam = config.gamma, config.lam
    match config.advantage:
        case "turn":
            return turn_gae(rewards_K, values_n, turn_ids_n, gamma=gamma, lam=lam)
        case "token":
            return trajectory_gae(rewards_K, values_n, turn_ids_n, gamma=gamma, lam=lam)
        case "bilevel":
            return bilevel_gae(rewards_K, values_n, turn_ids_n, gamma_turn=gamma, lam_turn=lam)
        case "within_turn":
            # The release: every turn is paid what the whole episode earned, less its own penalty.
            outcome = sum(turn.environment_reward for turn in trajectory.turns)
            paid_K = [outcome + turn.reward - turn.environment_reward for turn in trajectory.turns]
            return within_turn_gae(paid_K, values_n, turn_ids_n, gamma=gamma, lam=lam)


def grpo_advantages(groups: Sequence[Sequence[Trajectory]], data: TokenData, config: AlgorithmConfig) -> Tensor:
    """Group-relative advantages [N]: every token of a trajectory carries its trajectory's advantage.

    `groups` partitions the step's trajectories in order; statistics never leave a group.
    """
    per_trajectory: list[Tensor] = []
    for group in groups:
        rewards_G = torch.tensor([t.total_reward for t in group], dtype=torch.float32)
        per_trajectory.append(group_relative(rewards_G, normalise_std=config.normalise_std))
    return torch.cat(per_trajectory).to(data.old_logprobs_N.device)[data.trajectory_ids_N]
