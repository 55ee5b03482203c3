"""Who gets the credit: which task groups are trained on, and advantages and returns of every trained token of a step.

Legend: N trained tokens of the step, n of one trajectory, K turns of one trajectory, R turns of the step or of one
group, B trajectories of the step, G trajectories of one group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from epo.config import AlgorithmConfig
from epo.objectives import (
    Advantages,
    bilevel_gae,
    discounted_returns,
    gigpo,
    group_relative,
    leave_one_out,
    reinforce_plus_plus,
    trajectory_gae,
    turn_gae,
    whiten,
    within_turn_gae,
)
from epo.objectives.filters import snr, starpo_s
from epo.training.batch import TokenData
from epo.types import Trajectory

Groups = Sequence[Sequence[Trajectory]]
"""Partitions the step's trajectories, in order, by task."""


def kept_groups(groups: Groups, config: AlgorithmConfig) -> list[Sequence[Trajectory]]:
    """The task groups that `config.filter` lets through, in order; possibly none."""
    rewards = [_total_rewards(group) for group in groups]
    options = {} if config.filter_keep is None else {"keep": config.filter_keep}
    match config.filter:
        case "none":
            return list(groups)
        case "starpo_s":
            kept = starpo_s(rewards, **options)
        case "snr":
            kept = snr(rewards, **options)
    return [groups[i] for i in kept]


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


def critic_free_advantages(groups: Groups, data: TokenData, config: AlgorithmConfig) -> Tensor:
    """Advantages [N] from rewards alone, by `config.name`; statistics of a group never leave it.

    Raises:
        ValueError: `config.name` is that of an algorithm with a critic.
    """
    match config.name:
        case "grpo" if config.group_statistics == "row":
            paid = [_tensor([reward for t in group for reward in _paid_by_the_episode(t)]) for group in groups]
            parts = [group_relative(paid_R, normalise_std=config.normalise_std) for paid_R in paid]
            return _of_turns(groups, data, torch.cat(parts))
        case "grpo":
            parts = [group_relative(_total_rewards(group), normalise_std=config.normalise_std) for group in groups]
            return _of_trajectories(data, torch.cat(parts))
        case "dr_grpo":
            return _of_trajectories(data, _over_the_mean(groups))
        case "rloo":
            return _of_trajectories(data, torch.cat([leave_one_out(_total_rewards(group)) for group in groups]))
        case "reinforce_pp" if config.reinforce_baseline:
            return whiten(_of_trajectories(data, _over_the_mean(groups)))
        case "reinforce_pp":
            rewards_R = _tensor([reward for group in groups for t in group for reward in _turn_rewards(t)])
            return reinforce_plus_plus(rewards_R, data.trajectory_ids_N, data.turn_ids_N, gamma=config.gamma)
        case "gigpo":
            return _of_turns(groups, data, _gigpo(groups, config))
        case "ppo":
            raise ValueError("algorithm.name=ppo takes its advantages from the critic")


def _gigpo(groups: Groups, config: AlgorithmConfig) -> Tensor:
    """[R] over all turns of the step; equal text of the observation is the same anchor."""
    anchors: dict[str, int] = {}
    paid: list[float] = []
    returns: list[Tensor] = []
    ids: list[tuple[int, int, int]] = []
    members = [(group_id, trajectory) for group_id, group in enumerate(groups) for trajectory in group]
    for trajectory_id, (group_id, trajectory) in enumerate(members):
        by_row = config.group_statistics == "row"
        paid += _paid_by_the_episode(trajectory) if by_row else [trajectory.total_reward] * len(trajectory.turns)
        returns.append(discounted_returns(_tensor(_turn_rewards(trajectory)), gamma=config.gigpo_gamma))
        for turn in trajectory.turns:
            ids.append((trajectory_id, group_id, anchors.setdefault(turn.observation, len(anchors))))
    trajectory_ids_R, group_ids_R, anchor_ids_R = torch.tensor(ids).unbind(1)
    return gigpo(
        _tensor(paid),
        torch.cat(returns),
        trajectory_ids_R,
        group_ids_R,
        anchor_ids_R,
        weight=config.gigpo_weight,
        normalise_std=config.gigpo_normalise_std,
        statistics=config.group_statistics,
    )


def _estimate(trajectory: Trajectory, values_n: Tensor, turn_ids_n: Tensor, config: AlgorithmConfig) -> Advantages:
    rewards_K = _turn_rewards(trajectory)
    gamma, lam = config.gamma, config.lam
    match config.advantage:
        case "turn":
            return turn_gae(rewards_K, values_n, turn_ids_n, gamma=gamma, lam=lam)
        case "token":
            return trajectory_gae(rewards_K, values_n, turn_ids_n, gamma=gamma, lam=lam)
        case "bilevel":
            return bilevel_gae(rewards_K, values_n, turn_ids_n, gamma_turn=gamma, lam_turn=lam)
        case "within_turn":
            return within_turn_gae(_paid_by_the_episode(trajectory), values_n, turn_ids_n, gamma=gamma, lam=lam)


def _turn_rewards(trajectory: Trajectory) -> list[float]:
    return [turn.reward for turn in trajectory.turns]


def _paid_by_the_episode(trajectory: Trajectory) -> list[float]:
    """One reward per turn, as in the release: what the whole episode earned, less the turn's own penalty."""
    outcome = sum(turn.environment_reward for turn in trajectory.turns)
    return [outcome - turn.penalty for turn in trajectory.turns]


def _total_rewards(group: Sequence[Trajectory]) -> Tensor:
    return _tensor([trajectory.total_reward for trajectory in group])


def _tensor(rewards: list[float]) -> Tensor:
    """Single precision: equal rewards that were summed up in different orders come out equal."""
    return torch.tensor(rewards, dtype=torch.float32)


def _over_the_mean(groups: Groups) -> Tensor:
    """[B] reward of each trajectory less its group's mean."""
    return torch.cat([group_relative(_total_rewards(group), normalise_std=False) for group in groups])


def _of_trajectories(data: TokenData, advantages_B: Tensor) -> Tensor:
    """Every token carries what its trajectory has."""
    return advantages_B.to(data.old_logprobs_N.device)[data.trajectory_ids_N]


def _of_turns(groups: Groups, data: TokenData, advantages_R: Tensor) -> Tensor:
    """Every token carries what its turn has; tokens follow the order of trajectories and turns."""
    lengths_R = torch.tensor([len(turn.response_ids) for group in groups for t in group for turn in t.turns])
    return advantages_R.repeat_interleave(lengths_R).to(data.old_logprobs_N.device)
