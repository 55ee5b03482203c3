# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
"""Advantage estimators `epo_*` that follow a trajectory over all of its turns, in one row or in a row for each turn.

verl gives a registered estimator rewards, mask and group, but neither values nor trajectories; `step_rows` brings them
(trainer.py). Rewards of a trajectory are those of its last row: verl copies the final score to every other row.

Legend for tensor suffixes: _B rows, _L columns of a response, _N tokens of a trajectory or of the batch, _T turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from epo.errors import UserError
from epo.integrations.verl.rows import turn_runs
from epo.objectives import Advantages, bilevel_gae, group_relative, trajectory_gae, turn_gae, whiten


@dataclass
class StepRows:
    """What verl's estimators do not get of a batch."""

    trajectories_B: Sequence[str]
    """Trajectory of each row."""
    turns_B: Sequence[int]
    """Order of the rows within their trajectory."""
    mask_B_L: Tensor
    """Bool: written by the model, as rolled out."""
    scores_B_L: Tensor
    """Scores before any KL penalty."""
    values_B_L: Tensor | None
    """The critic's; None without one."""


_ROWS: ContextVar[StepRows | None] = ContextVar("epo_verl_step_rows", default=None)


@contextmanager
def step_rows(rows: StepRows) -> Iterator[None]:
    """Around a call of an estimator `epo_*`."""
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


@register_adv_est("epo_turn_gae")
def turn_gae_estimator(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """`epo.objectives.turn_gae`, whitened: turns are the steps, `algorithm.gamma` and `lam` are per turn.

    Args:
        token_level_rewards: [B, L].
        response_mask: [B, L] trained tokens.
        config: verl's `algorithm`.

    Returns:
        [B, L] advantages and returns, 0 outside the mask.

    Raises:
        UserError: without the trainer that brings values and trajectories.
    """
    return _gae(turn_gae, "epo_turn_gae", token_level_rewards, response_mask, gamma=config.gamma, lam=config.lam)


@register_adv_est("epo_bilevel_gae")
def bilevel_gae_estimator(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """`epo.objectives.bilevel_gae`, whitened: `algorithm.gamma` and `lam` are per turn, 1 inside a turn.

    Arguments, result and errors as `turn_gae_estimator`.
    """
    options = {"gamma_turn": config.gamma, "lam_turn": config.lam}
    return _gae(bilevel_gae, "epo_bilevel_gae", token_level_rewards, response_mask, **options)


@register_adv_est("epo_trajectory_gae")
def trajectory_gae_estimator(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """`epo.objectives.trajectory_gae`, whitened: verl's `gae`, but across the rows of a trajectory.

    Arguments, result and errors as `turn_gae_estimator`.
    """
    options = {"gamma": config.gamma, "lam": config.lam}
    return _gae(trajectory_gae, "epo_trajectory_gae", token_level_rewards, response_mask, **options)


@register_adv_est("epo_grpo")
def grpo_estimator(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, index: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """`epo.objectives.group_relative` over trajectories: each counts once in its group, however many rows it has.

    A group of one, or of equal rewards, gives exactly 0. `algorithm.norm_adv_by_std_in_grpo` as in verl.

    Args:
        token_level_rewards: [B, L].
        response_mask: [B, L] trained tokens.
        config: verl's `algorithm`.
        index: [B] group of each row, verl's `uid`.

    Returns:
        [B, L] advantages, twice.

    Raises:
        UserError: without the trainer that brings trajectories.
    """
    rows = _current("epo_grpo")
    rewards_B_L = _own_rewards(rows, token_level_rewards)
    groups: dict[Any, list[list[int]]] = {}
    for members in _by_trajectory(rows):
        groups.setdefault(index[members[0]], []).append(members)
    scores_B = torch.zeros(len(rewards_B_L), dtype=rewards_B_L.dtype, device=rewards_B_L.device)
    for trajectories in groups.values():
        rewards_G = torch.stack([rewards_B_L[members].sum() for members in trajectories])
        advantages_G = group_relative(rewards_G, normalise_std=config.norm_adv_by_std_in_grpo)
        for members, advantage in zip(trajectories, advantages_G, strict=True):
            scores_B[members] = advantage
    advantages_B_L = scores_B[:, None] * response_mask
    return advantages_B_L, advantages_B_L


def _gae(
    estimator: Callable[..., Advantages], name: str, rewards_B_L: Tensor, response_mask: Tensor, **options: float
) -> tuple[Tensor, Tensor]:
    rows = _current(name)
    if rows.values_B_L is None:
        raise UserError(f"algorithm.adv_estimator={name} needs a critic: set critic.enable=True")
    values_B_L, mask_B_L = rows.values_B_L, rows.mask_B_L.bool()
    rewards_B_L = _own_rewards(rows, rewards_B_L)
    runs_B_L = turn_runs(mask_B_L)
    advantages_B_L, returns_B_L = torch.zeros_like(values_B_L), torch.zeros_like(values_B_L)
    for members in _by_trajectory(rows):
        rewards_T: list[float] = []
        turns: list[Tensor] = []
        for row in members:
            # What is paid after a turn, on an observation even, is the turn's; before the first, the first's.
            runs_L = runs_B_L[row].clamp(min=0)
            turns.append(runs_L[mask_B_L[row]] + len(rewards_T))
            paid_T = torch.zeros(int(runs_L.max()) + 1, dtype=torch.float64, device=runs_L.device)
            rewards_T += paid_T.index_add(0, runs_L, rewards_B_L[row].double()).tolist()
        values_N = torch.cat([values_B_L[row][mask_B_L[row]] for row in members])
        found = estimator(rewards_T, values_N, torch.cat(turns), **options)
        lengths = [int(mask_B_L[row].sum()) for row in members]
        for row, advantages_N, returns_N in zip(
            members, found.advantages_N.split(lengths), found.returns_N.split(lengths), strict=True
        ):
            advantages_B_L[row, mask_B_L[row]] = advantages_N
            returns_B_L[row, mask_B_L[row]] = returns_N
    trained_B_L = response_mask.bool()
    whitened_B_L = torch.zeros_like(advantages_B_L)
    whitened_B_L[trained_B_L] = whiten(advantages_B_L[trained_B_L])
    return whitened_B_L, returns_B_L * trained_B_L


def _current(name: str) -> StepRows:
    rows = _ROWS.get()
    if rows is None:
        raise UserError(
            f"algorithm.adv_estimator={name} needs values and trajectories, which verl gives no registered estimator: "
            "set trainer.v1.trainer_mode=epo_sync and add epo.integrations.verl.trainer to VERL_USE_EXTERNAL_MODULES"
        )
    return rows


def _by_trajectory(rows: StepRows) -> list[list[int]]:
    """Rows with tokens of each trajectory, in the order of its turns. verl's padding has no token."""
    members: dict[str, list[int]] = {}
    has_tokens_B = rows.mask_B_L.bool().any(1).tolist()
    for row, trajectory in enumerate(rows.trajectories_B):
        if has_tokens_B[row]:
            members.setdefault(trajectory, []).append(row)
    return [sorted(found, key=lambda row: rows.turns_B[row]) for found in members.values()]


def _own_rewards(rows: StepRows, rewards_B_L: Tensor) -> Tensor:
    """[B, L] without the copies of the final score on rows that are not the last; a KL penalty stays where it is."""
    rewards_B_L = rewards_B_L.clone()
    for members in _by_trajectory(rows):
        rewards_B_L[members[:-1]] -= rows.scores_B_L[members[:-1]].to(rewards_B_L.dtype)
    return rewards_B_L
